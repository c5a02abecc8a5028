"""An AdaLoRA adapter's factors in PEFT's layers, as an allocator has them."""

from __future__ import annotations

from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn

from ..._library import library
from ...allocated import FollowedFactors
from ...devices import FACTORS
from ...sharding import check_unsharded

Factors = tuple[nn.Parameter, nn.Parameter, nn.Parameter]
_UNSHARDED = "use DistributedDataParallel, or prune before the model is sharded"


class LayerFactors(FollowedFactors):
    """{layer: lora_A, lora_B and lora_E of one adapter}: what AllocatedAdapters is for our layers.

    PEFT replaces parameters (load_adapter of a trimmed folder, hot-swapping), so they are looked up
    in the layers each time. Directions never move: they are masked alone.
    """

    def __init__(self, layers: dict[str, AdaLoraLayer], adapter: str) -> None:
        super().__init__()
        self._layers, self._adapter = layers, adapter
        self.check_sharding()
        self._factors = {name: self._now(name) for name in layers}

    def for_library(self) -> list:
        """The adapters as the C++ side has them."""
        return [
            library.Adapter(name, *factors, factors[0].shape[0])
            for name, factors in self._factors.items()
        ]

    @property
    def lora_E(self) -> dict[str, nn.Parameter]:
        return {name: self._now(name)[2] for name in self._layers}

    def note_allocator(self) -> None:
        """Nothing else in these layers needs to know."""

    def move_averages(self) -> None:
        """Nor do averages: no direction moves."""

    def check_sharding(self) -> None:
        for name in self._layers:
            factors = zip(FACTORS, self._now(name), strict=True)
            check_unsharded("AdaLoRA", {f"{name}.{f}": x for f, x in factors}, _UNSHARDED)

    def follow(self, core) -> None:
        """Before the allocator works: takes parameters that are in the place of those it has.

        Raises:
            RuntimeError: the adapter was deleted.
            ValueError: factors are sharded, or were replaced by others of another shape.
        """
        for name, layer in self._layers.items():
            if self._adapter not in layer.lora_E:
                raise RuntimeError(
                    f"RankAllocator: {name} has no adapter {self._adapter!r} any more; call "
                    "remove() on the handle that attach() returned"
                )
        self.check_sharding()
        for name in self._layers:
            self._take(core, name, self._now(name))

    def _now(self, name: str) -> Factors:
        layer, adapter = self._layers[name], self._adapter
        return layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_E[adapter]
