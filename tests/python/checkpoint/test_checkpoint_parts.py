# Models, optimizers and schedulers of other kinds: what they hold comes back.
import copy

import pytest
import torch
from checkpoint_trainings import Network, Run, same
from peft import PeftModel
from torch import nn
from torch.optim import lr_scheduler

import rankwise as rw
from rankwise.training_tensors import TrainingTensors

CONFIG = rw.LoRAConfig(rank=2, target_modules=["first", "second"])


def adapted(seed: int) -> nn.Module:
    model = Network()
    torch.manual_seed(seed)
    return rw.apply_lora(model, CONFIG)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, *optimizers, times: int = 3) -> None:
    for _ in range(times):
        model(torch.randn(5, 6)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_peft_and_load_adapter_read_the_folder(tmp_path):
    run = Run("lora", "adamw")
    run.train(range(3))
    run.save(tmp_path, 3)
    run.model.eval()
    x = torch.randn(5, 6)
    plain = Network().eval()
    plain.norm.load_state_dict(run.model.norm.state_dict())
    loaded = rw.apply_lora(copy.deepcopy(plain), rw.LoRAConfig(rank=1, target_modules=["first"]))
    rw.load_adapter(loaded, tmp_path, name="read")
    assert torch.equal(loaded(x), run.model(x))
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path).eval()(x), run.model(x))


@pytest.mark.parametrize("wrap", [torch.compile, torch.optim.swa_utils.AveragedModel])
def test_wrapped_and_plain_models_read_each_others(wrap, tmp_path):
    model = adapted(1)
    optimizer = torch.optim.AdamW(trained(model))
    step(model, optimizer)
    rw.save_checkpoint(tmp_path, model, optimizer, step=3)
    other = adapted(2)
    inner = wrap(other)
    outer = inner.module if isinstance(inner, torch.optim.swa_utils.AveragedModel) else other
    again = torch.optim.AdamW(trained(outer))
    assert rw.load_checkpoint(tmp_path, inner, again) == 3
    assert same(dict(outer.state_dict()), dict(model.state_dict()))
    rw.save_checkpoint(tmp_path, inner, again, step=4)
    assert rw.load_checkpoint(tmp_path, model, optimizer) == 4


def test_wrappers_inside_of_the_model(tmp_path):
    model = adapted(1)
    optimizer = torch.optim.AdamW(trained(model))
    step(model, optimizer)
    rw.save_checkpoint(tmp_path, model, optimizer)
    other = adapted(2)
    other.first = torch.compile(other.first)
    rw.load_checkpoint(tmp_path, other, torch.optim.AdamW(trained(other)))
    assert torch.equal(other.first._orig_mod.lora_A, model.first.lora_A)
    assert torch.equal(other.second.lora_B, model.second.lora_B)


def test_several_optimizers_and_waiting_adapters(tmp_path):
    def make(seed: int):
        model = adapted(seed)
        rw.add_adapter(model, "other", rw.LoRAConfig(rank=1, target_modules=["first"]))
        rw.activate_adapter(model, "default")
        A = [p for n, p in model.named_parameters() if n.endswith("lora_A") and p.requires_grad]
        B = [p for n, p in model.named_parameters() if n.endswith("lora_B") and p.requires_grad]
        return model, [torch.optim.AdamW(A), torch.optim.SGD(B, 0.1, momentum=0.5)]

    model, optimizers = make(1)
    step(model, *optimizers)
    rw.save_checkpoint(tmp_path, model, optimizers)
    other, again = make(2)
    rw.load_checkpoint(tmp_path, other, again)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    for one, two in zip(optimizers, again, strict=True):
        assert same(two.state_dict(), one.state_dict())


def test_parameters_that_the_model_does_not_have(tmp_path):
    def make(seed: int):
        model = adapted(seed)
        centres = nn.Parameter(torch.full((3,), float(seed)))
        return model, centres, torch.optim.AdamW([*trained(model), centres])

    model, centres, optimizer = make(1)
    centres.grad = torch.ones(3)
    step(model, optimizer)
    rw.save_checkpoint(tmp_path, model, optimizer)
    other, there, again = make(2)
    rw.load_checkpoint(tmp_path, other, again)
    assert torch.equal(there, centres) and same(again.state_dict(), optimizer.state_dict())


class Wide(torch.optim.Optimizer):
    """State of other types than its parameters'."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"betas": (0.9, float("inf")), "note": None})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["mean"] = torch.full_like(parameter, 1 / 3, dtype=torch.float64)
            state["count"] = torch.tensor([2**40 + 1])
            state["codes"] = [torch.tensor([7], dtype=torch.uint8), (0.1, "text", True)]


def test_state_is_not_rounded_to_its_parameters_type(tmp_path):
    model, other = adapted(1).to(torch.bfloat16), adapted(2).to(torch.bfloat16)
    optimizer, again = Wide(trained(model)), Wide(trained(other))
    optimizer.step()
    rw.save_checkpoint(tmp_path, model, optimizer)
    rw.load_checkpoint(tmp_path, other, again)
    assert same(again.state_dict(), optimizer.state_dict())


class WithNumbers(Wide):
    """State that is no tensor."""

    def step(self) -> None:
        super().step()
        for state in self.state.values():
            state |= {"rate": 0.1, "count of none": 0, "kind": "text"}


def test_state_that_is_no_tensor(tmp_path):
    model, other = adapted(1), adapted(2)
    optimizer, again = WithNumbers(trained(model)), WithNumbers(trained(other))
    optimizer.step()
    rw.save_checkpoint(tmp_path, model, optimizer)
    rw.load_checkpoint(tmp_path, other, again)
    assert same(again.state_dict(), optimizer.state_dict())


def test_the_base_is_in_no_checkpoint():
    model = adapted(1)
    names = set(TrainingTensors("save_checkpoint", model, []).tensors())
    assert {"first.lora_A", "second.lora_B"} <= names <= set(model.state_dict())
    assert not {"first.weight", "second.weight"} & names


SCHEDULERS = {
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [1, 1, 3], 0.1),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 3)),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tmp_path):
    def make():
        model = adapted(1)
        optimizer = torch.optim.AdamW(trained(model), 0.1)
        return model, optimizer, None, SCHEDULERS[name](optimizer)

    def rates(optimizer, scheduler, times: int) -> list[float]:
        found = []
        for i in range(times):
            optimizer.step()
            scheduler.step(*[float(i)] * (name == "plateau"))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    parts = make()
    rates(parts[1], parts[3], 3)
    rw.save_checkpoint(tmp_path, *parts)
    again = make()
    rw.load_checkpoint(tmp_path, *again)
    assert rates(again[1], again[3], 4) == rates(parts[1], parts[3], 4)
    assert same(again[3].state_dict(), parts[3].state_dict())


def test_adalora_that_peft_cannot_hold(tmp_path):
    config = rw.AdaLoRAConfig(
        initial_rank=3, target_rank=1, total_steps=9, target_modules=["first", "second"],
        alpha_pattern={"second": 2.0},
    )  # fmt: skip

    def make():
        model = rw.apply_lora(Network(), config)
        return model, torch.optim.AdamW(trained(model)), rw.RankAllocator(model, config)

    parts, again = make(), make()
    parts[2].attach(parts[1])
    step(parts[0], parts[1])
    with pytest.raises(ValueError, match="use export_lora"):
        rw.save_adapter(parts[0], tmp_path)
    rw.save_checkpoint(tmp_path, *parts, step=3)
    assert rw.load_checkpoint(tmp_path, *again) == 3
    assert same(again[2].state_dict(), parts[2].state_dict())
    PeftModel.from_pretrained(Network(), tmp_path)
