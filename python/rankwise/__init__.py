"""rankwise: LoRA and AdaLoRA for PyTorch, computed by a C++ library for LibTorch."""

from importlib import import_module

from . import analysis, nn, ops
from ._library import __version__
from .allocation import RankAllocator
from .checkpoint import load_checkpoint, save_checkpoint
from .config import AdaLoRAConfig, LoRAConfig
from .file_config import adalora_config
from .files import FileError, LoadReport, export_lora, load_adapter, save_adapter
from .first_gradients import LoRAGA
from .first_inputs import EVA
from .first_weights import OLoRA, PiSSA
from .html_report import write_report
from .merging import MergeReport, merge, unmerge
from .model import (
    activate_adapter,
    adapter_names,
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
)
from .parameters import parameter_groups, print_trainable_parameters
from .plain import unload
from .rank_history import RankHistory
from .report import health_check, summary
from .shared_inputs import share_inputs
from .spectral import RankQuestion, SpectralAllocator, SpectralConfig
from .sweep_grid import rank_grid
from .sweeping import Sweep, sweep
from .tensorboard import TensorBoardLog

__all__ = [
    "AdaLoRAConfig",
    "EVA",
    "FileError",
    "LoRAConfig",
    "LoRAGA",
    "LoadReport",
    "MergeReport",
    "OLoRA",
    "PiSSA",
    "RankAllocator",
    "RankHistory",
    "RankQuestion",
    "SpectralAllocator",
    "SpectralConfig",
    "Sweep",
    "TensorBoardLog",
    "__version__",
    "activate_adapter",
    "adalora_config",
    "adapter_names",
    "add_adapter",
    "analysis",
    "apply_lora",
    "delete_adapter",
    "disable_adapters",
    "export_lora",
    "health_check",
    "load_adapter",
    "load_checkpoint",
    "merge",
    "nn",
    "ops",
    "parameter_groups",
    "print_trainable_parameters",
    "rank_grid",
    "save_adapter",
    "save_checkpoint",
    "share_inputs",
    "summary",
    "sweep",
    "unload",
    "unmerge",
    "write_report",
]


def __getattr__(name: str):
    """`plots`, with matplotlib, only for those who ask for it."""
    if name == "plots":
        return import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
