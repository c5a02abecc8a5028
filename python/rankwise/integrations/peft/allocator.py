"""AdaLoRA of PEFT models: rankwise's RankAllocator over PEFT's layers."""

from __future__ import annotations

import torch
from peft import AdaLoraConfig
from peft.tuners import adalora
from peft.tuners.adalora.layer import AdaLoraLayer

from ...allocation import RankAllocator
from ...config import AdaLoRAConfig
from ...devices import FACTORS
from ...warned import warn
from .allocated import LayerFactors

# AdaLoRAConfig's names and PEFT's.
_SCHEDULE = {
    "initial_rank": "init_r",
    "target_rank": "target_r",
    "total_steps": "total_step",
    "warmup_steps": "tinit",
    "final_steps": "tfinal",
    "allocation_interval": "deltaT",
    "beta1": "beta1",
    "beta2": "beta2",
}


class PeftRankAllocator(RankAllocator):
    """The `rankallocator` of an accelerated AdaLoRA model: rankwise.RankAllocator over its layers.

    It masks and never shrinks: until finish() checkpoints hold factors of the first size and no
    `rank_pattern`, so that they load into a model that is made anew, at any step.

    Args:
        layers: {name in the model: the layer} with the adapter.
        adapter: its name.
        peft_config: of the adapter.
        replaced: the allocator of PEFT's that was here.
    """

    def __init__(
        self,
        layers: dict[str, AdaLoraLayer],
        adapter: str,
        peft_config: AdaLoraConfig,
        replaced: adalora.RankAllocator,
    ) -> None:
        schedule = {ours: getattr(peft_config, name) for ours, name in _SCHEDULE.items()}
        config = AdaLoRAConfig(target_modules=list(layers), shrink=False, **schedule)
        self.adapter, self.peft_config, self.replaced = adapter, peft_config, replaced
        self._take(config, LayerFactors(layers, adapter))
        self._said_attached = False
        self._go_on()

    @property
    def orthogonality_weight(self) -> float:
        """Of the penalty ("mean_norm") that the model adds to its loss in training."""
        return self.peft_config.orth_reg_weight

    def allocate_at(self, global_step: int) -> None:
        """step(), as the step of that number: also where numbers start at 0, or some are left out.

        Does nothing, and says so once, where the allocator is attached to an optimizer.
        """
        if self._attached:
            if not self._said_attached:
                self._said_attached = True
                warn(
                    "update_and_allocate: the allocator is attached to an optimizer, which runs "
                    "it; calls by hand do nothing"
                )
            return
        step = min(int(global_step), self.config.total_steps - self.config.final_steps)
        if not self.frozen and self.steps != step - 1:
            self._core.load_state(self.state_dict() | {"steps": torch.tensor(step - 1)})
        self.step(None)

    def finish(self) -> None:
        """At the end of training: writes `rank_pattern` into PEFT's configuration, once.

        Folders saved from then on hold the kept directions alone. No parameter changes: a direction
        is kept, too, where its lora_E is not zero, as after loading an earlier checkpoint.
        """
        if self.peft_config.rank_pattern is not None:
            return
        lora_E = self._adapters.lora_E
        self.peft_config.rank_pattern = {
            f"{name}.lora_E.{self.adapter}": (
                kept | (lora_E[name].detach().cpu().view(-1) != 0)
            ).tolist()
            for name, kept in self.pattern.items()
        }

    def _go_on(self) -> None:
        """From where PEFT's allocator was: its averages, or a pattern that is final already."""
        state, stock = self.state_dict(), self.replaced
        for name in self.ranks:
            for factor in (f"{name}.{letter}" for letter in FACTORS):
                known = f"{factor}.{self.adapter}"
                if known in stock.exp_avg_ipt:
                    state[f"{factor}.sensitivity"].copy_(stock.exp_avg_ipt[known])
                    state[f"{factor}.uncertainty"].copy_(stock.exp_avg_unc[known])
        kept = self._pattern_so_far()
        if kept and sum(map(sum, kept.values())) <= self.config.target_rank * len(kept):
            averages = (".sensitivity", ".uncertainty")
            state = {k: v for k, v in state.items() if not k.endswith(averages)}
            state |= {
                f"{name}.kept": torch.tensor(mask, dtype=torch.bool) for name, mask in kept.items()
            }
            state["frozen"] = torch.tensor(1)
        self._core.load_state(state, at_work=False)

    def _pattern_so_far(self) -> dict[str, list[bool]]:
        """By PEFT's configuration, which keeps it where the factors were trimmed by it."""
        config, rows = self.peft_config, self.ranks
        if config.rank_pattern is None:
            return {}
        pattern = {
            key.removesuffix(f".{self.adapter}").removesuffix(".lora_E"): mask
            for key, mask in config.rank_pattern.items()
        }
        if pattern.keys() == rows.keys() and all(len(pattern[n]) == rows[n] for n in rows):
            config.rank_pattern = None  # until finish()
            return pattern
        return {name: [True] * rank for name, rank in rows.items()}

    def __getstate__(self) -> dict:
        own = {name: getattr(self, name) for name in ("adapter", "peft_config", "replaced")}
        return super().__getstate__() | {"own": own}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state["own"], _said_attached=False)
        super().__setstate__(state)


def allocator_for(tuner: adalora.AdaLoraModel) -> PeftRankAllocator | None:
    """An allocator for a tuner's trainable adapter; None where it trains none.

    Raises:
        ValueError: PEFT's configuration asks for what cannot be, such as target_r above init_r.
    """
    stock = vars(tuner).get("rankallocator")
    if stock is None:
        return None
    name = tuner.trainable_adapter_name
    layers = {
        path: module
        for path, module in tuner.model.named_modules()
        if isinstance(module, AdaLoraLayer) and name in module.lora_E
    }
    if not any(layer.lora_A[name].shape[0] for layer in layers.values()):
        return None  # a folder of which nothing was kept
    return PeftRankAllocator(layers, name, tuner.peft_config[name], stock)
