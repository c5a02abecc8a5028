"""Checkpoints of models with adapters: the adapter's folder and what trains, not the base."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from ...directions import ORDER
from ...files import export_lora, save_adapter
from ...first_factors import FIRST
from ...model_adapters import ModelAdapters
from ...tree import adapted_layers
from ...warned import warn
from ...wrappers import unwrapped

_FIRST = (f"{FIRST}.lora_A", f"{FIRST}.lora_B")


class AdapterCallback(TrainerCallback):
    """Makes a Trainer write adapters instead of whole models: ``callbacks=[AdapterCallback()]``.

    For models of apply_lora() and load_adapter(). A checkpoint, ``trainer.save_model()`` and
    ``push_to_hub()`` then have PEFT's folder, as of save_adapter() (of AdaLoRA that PEFT cannot
    hold, as of export_lora()), and in ``model.safetensors`` what trains as the module has it, for
    the Trainer to load: resume_from_checkpoint and load_best_model_at_end work, also in a new
    process that made the same adapters.

    From then on ``model.save_pretrained()`` writes such a folder; while the model is merged, and
    once it is unloaded, it writes the plain model as before. The first step tells, with a warning,
    what no gradient reached.

    Raises:
        ValueError: when training begins and the model has no adapters, or under DeepSpeed or FSDP,
            whose checkpoints are their own.
    """

    def on_init_end(self, args, state, control, model=None, **_) -> None:
        if model is not None and adapted_layers(model):
            save_adapters_alone(model)

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        check_whole_parameters(type(self).__name__, args)
        if not adapted_layers(model):
            raise ValueError(
                f"{type(self).__name__}: the model has no adapters; call rankwise.apply_lora("
                "model, config) before the Trainer is made (checkpoints of PEFT's models are "
                "adapters already)"
            )
        save_adapters_alone(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        if state.global_step == 0:
            warn_of_missing_gradients(model)

    def on_save(self, args, state, control, model=None, **_) -> None:
        folder = checkpoint_folder(args, state)
        by_trainer = not hasattr(unwrapped(model), "save_pretrained")
        if folder is not None and by_trainer and adapted_layers(model):
            _write(model, folder)


def check_whole_parameters(owner: str, args) -> None:
    """Refuses, by name, training that cuts parameters into parts or owns the optimizer's step."""
    if args.deepspeed or getattr(args, "deepspeed_plugin", None):
        raise ValueError(
            f"{owner}: DeepSpeed (ZeRO) steps and saves by itself and may hold parts of factors "
            "alone; train without args.deepspeed, with DistributedDataParallel"
        )
    fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if fsdp:
        raise ValueError(
            f"{owner}: FSDP holds parts of factors; train without args.fsdp, with "
            "DistributedDataParallel"
        )


def warn_of_missing_gradients(model: nn.Module) -> None:
    """After the first backward pass: names what the loss passed over."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        warn(
            f"no gradient reached {', '.join(without[:3])}{more}: what computes the loss does not "
            "call these modules (a fused output layer multiplies by lm_head.weight by itself); "
            "leave them out of target_modules"
        )


def checkpoint_folder(args, state) -> Path | None:
    """Where the Trainer has just written, for the process that writes there."""
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return folder if args.should_save and folder.is_dir() else None


def save_adapters_alone(model: nn.Module) -> None:
    """Gives transformers' models in it, the outermost, a save_pretrained that writes adapters."""
    model = unwrapped(model)
    if not any(hook.hook is _complete for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_complete)
    for inner in _pretrained(model):
        if adapted_layers(inner):
            inner.save_pretrained = partial(_save_pretrained, inner)


def _pretrained(module: nn.Module) -> list[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        return [module]
    return [found for child in module.children() for found in _pretrained(child)]


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **options,
) -> None:
    layers = adapted_layers(model).values()
    if not layers or any(layer.merged for layer in layers):
        options |= dict(is_main_process=is_main_process, push_to_hub=push_to_hub)
        return type(model).save_pretrained(model, save_directory, **options)
    if push_to_hub:
        raise ValueError("save_pretrained: for adapters call model.push_to_hub(repo_id) instead")
    if is_main_process:
        _write(model, save_directory)


def _write(model: nn.Module, folder: str | os.PathLike) -> None:
    try:
        save_adapter(model, folder)
    except ValueError as error:  # AdaLoRA with several initial ranks or alphas?
        try:
            export_lora(model, folder)
        except ValueError:
            raise error from None
    save_file(trained_state(model), Path(folder) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What of the model's state_dict() trains, each tensor once, with the directions' order and the
    first factors.
    """
    places = ModelAdapters.of(model).places
    whole = [
        place.copies[place.adapter].module for place in places if place.adapter in place.copies
    ]
    own = {id(t) for module in whole for t in (*module.parameters(), *module.buffers())}
    state = {k: t for k, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    first: dict[int, str] = {}
    for key, tensor in state.items():
        if tensor.requires_grad or id(tensor) in own:
            first.setdefault(id(tensor), key)
    layers = {key.rpartition(".")[0] for key in first.values() if key.endswith(".lora_A")}
    noted = [f"{layer}.{key}" for layer in layers for key in (ORDER, *_FIRST)]
    also = [key for key in noted if key in state]
    return {key: state[key].detach().contiguous() for key in (*first.values(), *also)}


def _complete(model: nn.Module, state: dict[str, Tensor], *_) -> None:
    """Before trained_state() is loaded: adds the rest, which a Trainer would call missing."""
    if not adapted_layers(model):
        return
    trained = trained_state(model)
    if trained and _without_orders(state) == _without_orders(trained):
        own = model.state_dict()
        state.update({key: own[key] for key in own.keys() - trained.keys()})


def _without_orders(state: dict[str, Tensor]) -> set[str]:
    return {key for key in state if not key.endswith(f".{ORDER}")}
