# Shrinking at the freeze: same outputs, the optimizer goes on as in a model built small.
import pytest
import torch
from allocation_models import LAYERS, LETTERS, Network, batch, loss_of, network, train, trained

import rankwise as rw

FREEZE, TOTAL = 8, 16
OPTIONS = dict(total_steps=TOTAL, final_steps=TOTAL - FREEZE, warmup_steps=1)
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.03, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.03, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.03, weight_decay=0.1, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 0.03, amsgrad=True),
    "adam with decay": lambda p: torch.optim.Adam(p, 0.03, weight_decay=0.2),
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "adamax": lambda p: torch.optim.Adamax(p, 0.02),
    "nadam": lambda p: torch.optim.NAdam(p, 0.02),
    "radam": lambda p: torch.optim.RAdam(p, 0.02),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}
# Different sizes may be summed in another order; Rprop only reads signs.
TOLERANCE = dict(rtol=1e-10, atol=1e-12)


def frozen_run(name: str, shrink: bool, **options):
    model, allocator = network(**OPTIONS | options, shrink=shrink)
    optimizer = OPTIMIZERS[name](trained(model))
    allocator.attach(optimizer)
    train(model, optimizer, range(1, FREEZE + 1))
    assert allocator.frozen
    return model, allocator, optimizer


def layers(model) -> list:
    return [model.get_submodule(name) for name in LAYERS]


def along(letter: str, tensor: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(1 if letter == "B" else 0, kept.nonzero().squeeze(1))


def built_small(masked, allocator, optimizer, make):
    """A model with as many directions as were kept, made from a masked run, and its optimizer."""
    small, pairs = Network(), {}
    for name in LAYERS:
        big, kept = masked.get_submodule(name), allocator.pattern[name]
        rank = int(kept.sum())
        layer = rw.nn.AdaLoRALinear.from_linear(
            getattr(small, name), rank=rank, alpha=big.scaling * rank
        )
        with torch.no_grad():
            layer.weight.copy_(big.weight)
            layer.bias.copy_(big.bias)
            for letter, factor in LETTERS.items():
                getattr(layer, factor).copy_(along(letter, getattr(big, factor), kept))
                pairs[getattr(layer, factor)] = (letter, getattr(big, factor), kept)
        setattr(small, name, layer)
    twin = make(trained(small))
    for parameter, (letter, big, kept) in pairs.items():
        for key, value in optimizer.state.get(big, {}).items():
            if torch.is_tensor(value) and value.dim() > 0:
                value = along(letter, value, kept)
            twin.state[parameter][key] = value.clone() if torch.is_tensor(value) else value
    return small, twin


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_in_a_model_built_small(name):
    model, allocator, optimizer = frozen_run(name, shrink=True)
    masked, other, other_optimizer = frozen_run(name, shrink=False)
    kept = list(allocator.pattern.values())
    assert all(torch.equal(a, b) for a, b in zip(kept, other.pattern.values(), strict=True))
    assert any(not k[: k.sum()].all() for k in kept), "nothing had to move"
    small, twin = built_small(masked, other, other_optimizer, OPTIMIZERS[name])
    x = batch(0)[0]
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)
    for step in range(FREEZE + 1, TOTAL + 4):
        train(model, optimizer, [step])
        train(small, twin, [step])
        for layer, little in zip(layers(model), layers(small), strict=True):
            assert layer.rank == little.rank < 6 and layer.scaling == 1.0
            for letter, factor in LETTERS.items():
                got, wanted = getattr(layer, factor), getattr(little, factor)
                axis = 1 if letter == "B" else 0
                active = got.narrow(axis, 0, layer.rank)
                torch.testing.assert_close(active, wanted, **TOLERANCE, msg=f"{step} {factor}")
                rest = got.narrow(axis, layer.rank, got.shape[axis] - layer.rank)
                assert torch.equal(rest, torch.zeros_like(rest)), f"{step}: inactive {factor}"


@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_masking_trains_the_kept_directions_alike(name):
    model, allocator, optimizer = frozen_run(name, shrink=True)
    masked, _, other = frozen_run(name, shrink=False)
    steps = range(FREEZE + 1, TOTAL + 1)
    a, b = train(model, optimizer, steps), train(masked, other, steps)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-11
    for layer, big in zip(layers(model), layers(masked), strict=True):
        assert int((big.lora_E != 0).sum()) == layer.rank == int((layer.lora_E != 0).sum())


def test_outputs_are_equal_before_and_after():
    """Of the last choice itself: E is masked first, then moved."""
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, FREEZE))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    train(model, optimizer, [FREEZE])
    x = batch(3)[0]
    after = model(x)
    for layer in layers(model):
        layer.rank = 6
    for name, parameter in model.named_parameters():
        kept = allocator.pattern.get(name.split(".")[0])
        with torch.no_grad():
            parameter.copy_(before[name])
            if name.endswith("lora_E"):
                parameter.mul_(kept[:, None])
    torch.testing.assert_close(after, model(x), rtol=1e-12, atol=1e-12)


def test_parameters_and_state_keep_their_identity_and_storage():
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(model), 0.03, amsgrad=True)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, FREEZE))
    tensors = [
        t for p in trained(model) for t in (p, *optimizer.state[p].values()) if torch.is_tensor(t)
    ]
    facts = [(id(t), t.data_ptr(), t.shape, t.stride()) for t in tensors]
    parameters = [id(p) for p in model.parameters()]
    train(model, optimizer, range(FREEZE, TOTAL))
    assert [id(p) for p in model.parameters()] == parameters
    again = [
        t for p in trained(model) for t in (p, *optimizer.state[p].values()) if torch.is_tensor(t)
    ]
    assert [(id(t), t.data_ptr(), t.shape, t.stride()) for t in again] == facts
    assert sum(layer.rank for layer in layers(model)) == 6
    assert all(layer.capacity == 6 and layer.options.rank == 6 for layer in layers(model))


def test_gradients_move_too():
    """What other hooks read after the step: gradients and parameters of the same direction."""
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    pairs = []

    def record(*_):
        pairs.append([(p.detach().clone(), p.grad.clone()) for p in trained(model)])

    optimizer.register_step_post_hook(record)
    allocator.attach(optimizer)
    optimizer.register_step_post_hook(record)
    train(model, optimizer, range(1, FREEZE + 1))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, (_, old), (_, new) in zip(names, pairs[-2], pairs[-1], strict=True):
        kept, letter = allocator.pattern[name.split(".")[0]], name[-1]
        wanted, axis = along(letter, old, kept), 1 if letter == "B" else 0
        assert torch.equal(new.narrow(axis, 0, wanted.shape[axis]), wanted), name
        assert not new.narrow(axis, wanted.shape[axis], 6 - wanted.shape[axis]).any()


def test_less_is_saved_for_backward():
    model, allocator = network(**OPTIONS, initial_rank=19, alpha=19.0)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    allocator.attach(optimizer)
    hidden: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        hidden.append(tuple(tensor.shape))
        return tensor

    def shapes() -> list[tuple[int, ...]]:
        hidden.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss_of(model, 1)
        return list(hidden)

    assert shapes().count((5, 19)) == 3
    train(model, optimizer, range(1, FREEZE + 1))
    after = shapes()
    assert (5, 19) not in after
    for rank in allocator.ranks.values():
        assert (5, rank) in after


def test_a_layer_left_without_directions_computes_its_base_alone():
    model, allocator, optimizer = frozen_run("adamw", shrink=True, target_rank=0)
    x = batch(3)[0]
    with rw.disable_adapters(model):
        base = model(x)
    assert torch.equal(model(x), base)
    losses = train(model, optimizer, range(FREEZE + 1, TOTAL + 1))
    assert not any(p.any() for p in trained(model)) and all(x == x for x in losses)
