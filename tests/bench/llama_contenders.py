# Llama-shaped models with random weights, and the training steps over them that are measured.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw

from .adalora_phases import PENALTY, PHASES, our_config, peft_config
from .training_step import Step, optimizer_of, shared

RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE = torch.bfloat16
# Of a norm: what 16 bits leave of the gradients, not a factor or a term that is missing.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    batch: int
    length: int


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2, 128, 2, 16),
    "1b": Size(2048, 8192, 16, 32, 8, 32000, 4, 2048),  # 1.2 billion parameters
}


@dataclass(frozen=True)
class Task:
    """A base of bfloat16 and a batch [batch, length], of which it is trained to tell the tokens."""

    model: LlamaForCausalLM
    ids: Tensor

    @staticmethod
    def of(size: Size, device: str) -> Task:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=size.hidden, intermediate_size=size.intermediate,
            num_hidden_layers=size.layers, num_attention_heads=size.heads,
            num_key_value_heads=size.key_value_heads, vocab_size=size.vocabulary,
            max_position_embeddings=size.length, attn_implementation="sdpa", use_cache=False,
            tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device(device):
            model = LlamaForCausalLM(config).to(BASE).train()
        ids = torch.randint(size.vocabulary, (size.batch, size.length), device=device)
        return Task(model.requires_grad_(False), ids)

    @property
    def device(self) -> str:
        return self.ids.device.type


def frozen(task: Task) -> Callable[[], object]:
    """Forward, and backward to the embedded tokens: the cost of the base alone."""
    embedded = task.model.get_input_embeddings()(task.ids).detach().requires_grad_()
    inputs = dict(inputs_embeds=embedded, labels=task.ids)
    return lambda: torch.autograd.grad(task.model(**inputs).loss, embedded)


def step_of(
    task: Task, model: nn.Module, forward: Callable, autocast: bool, after=lambda: None
) -> Step:
    def loss() -> Tensor:
        with torch.autocast(task.device, BASE, enabled=autocast):
            return forward(input_ids=task.ids, labels=task.ids).loss

    draw_factors(model)
    return Step(model, loss, optimizer_of(model, fused=task.device == "cuda"), after)


def peft_lora(task: Task, dropout: float, wide: bool) -> Step:
    """`wide`: float32 factors, PEFT's default, under autocast; else of the base's dtype."""
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=TARGETS
    )  # fmt: skip
    model = get_peft_model(shared(task.model), config, autocast_adapter_dtype=wide)
    return step_of(task, model, model, wide)


def our_lora(task: Task, dropout: float, wide: bool, autocast: bool = False) -> Step:
    """`wide`: float32 factors, our default; else of the base's dtype."""
    config = rw.LoRAConfig(
        rank=RANK, alpha=2 * RANK, dropout=dropout, target_modules=TARGETS,
        adapter_dtype=None if wide else BASE,
    )  # fmt: skip
    model = rw.apply_lora(shared(task.model), config)
    return step_of(task, model, model, autocast)


def peft_adalora(task: Task, dropout: float, wide: bool) -> Step:
    config = peft_config("budgeting", target_modules=TARGETS, lora_dropout=dropout)
    model = get_peft_model(shared(task.model), config, autocast_adapter_dtype=wide)
    moment, *_ = PHASES["budgeting"]
    allocate = model.base_model.update_and_allocate
    # The base model's forward adds the penalty.
    return step_of(task, model, model.base_model, wide, lambda: allocate(moment))


def our_adalora(task: Task, dropout: float, wide: bool) -> Step:
    config = our_config(
        "budgeting", target_modules=TARGETS, dropout=dropout, adapter_dtype=None if wide else BASE
    )
    model = rw.apply_lora(shared(task.model), config)
    plain, allocator = step_of(task, model, model, autocast=False), rw.RankAllocator(model, config)
    allocator.attach(plain.optimizer)

    def loss() -> Tensor:
        return plain.loss() + PENALTY * allocator.orthogonality_penalty("mean_norm")

    return Step(model, loss, plain.optimizer, allocator=allocator)


LORA: dict[str, Callable[[Task, float], Step]] = {
    "PEFT, bf16 factors": lambda task, p: peft_lora(task, p, wide=False),
    "PEFT, fp32 factors, autocast": lambda task, p: peft_lora(task, p, wide=True),
    "rankwise, bf16 factors": lambda task, p: our_lora(task, p, wide=False),
    "rankwise, fp32 factors": lambda task, p: our_lora(task, p, wide=True),
    "rankwise, fp32 factors, autocast": lambda task, p: our_lora(task, p, wide=True, autocast=True),
}
ADALORA: dict[str, Callable[[Task, float], Step]] = {
    "PEFT, bf16 factors": lambda task, p: peft_adalora(task, p, wide=False),
    "PEFT, fp32 factors, autocast": lambda task, p: peft_adalora(task, p, wide=True),
    "rankwise, bf16 factors": lambda task, p: our_adalora(task, p, wide=False),
    "rankwise, fp32 factors": lambda task, p: our_adalora(task, p, wide=True),
}


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """A, B and E of all layers, by names that PEFT's models and ours have in common."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            found[name.removesuffix(".weight")] = parameter
    return found


def draw_factors(model: nn.Module) -> None:
    """The same values in all models, none of them zero, which would hide gradients."""
    own = factors(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(own):
            own[name].copy_(torch.randn(own[name].shape, generator=generator).mul_(0.02))


def check(steps: dict[str, Step]) -> None:
    """Raises unless all have the first one's gradients; masks of dropout would differ."""
    first, wanted = "", {}
    for name, step in steps.items():
        step.loss().backward()
        found = {key: p.grad.detach().float() for key, p in factors(step.model).items()}
        step.optimizer.zero_grad()
        if not wanted:
            first, wanted = name, found
        assert found.keys() == wanted.keys(), f"{name} trains other factors than {first}"
        error = sum((found[k] - wanted[k]).square().sum() for k in found).sqrt()
        norm = sum(g.square().sum() for g in wanted.values()).sqrt()
        if not error <= TOLERANCE * norm:
            raise AssertionError(
                f"{name}: gradients must be those of {first} but for {TOLERANCE:g} of their norm, "
                f"got {(error / norm).item():.2e}"
            )
