# Probes of a SpectralAllocator: what they see of the dense gradient, in a training and around it.
import copy

import pytest
import torch
from spectral_models import SHAPES, Planted, config, cost_of, spectral, train, trained

import rankwise as rw


def unserved_of(model: Planted, step: int) -> dict[str, float]:
    """|dL/dW (I - V V^T)|^2 from the dense gradients of the weights."""
    found = {}
    weights = {name: model.get_submodule(name).weight for name in SHAPES}
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(model.loss(step), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    for name, gradient in zip(weights, gradients, strict=True):
        layer = model.get_submodule(name)
        V = torch.linalg.qr(layer.lora_A.detach()[:3].double().T).Q  # of the active directions
        seen = gradient.double()
        found[name] = (seen - seen @ V @ V.T).square().sum().item()
    return found


def test_they_estimate_what_the_dense_gradient_has_beside_their_directions():
    sums, wanted = dict.fromkeys(SHAPES, 0.0), None
    draws = 300
    for seed in range(draws):
        asked = []
        model, allocator = spectral(
            rule=lambda q: asked.append(q.unserved) or q.ranks,  # noqa: B023
            probes=4, max_rank=7, seed=seed, allocation_interval=2, warmup_steps=0,
        )  # fmt: skip
        optimizer = torch.optim.SGD(trained(model), lr=0.0)
        allocator.attach(optimizer)
        train(model, optimizer, [0])
        wanted = wanted or unserved_of(model, 1)
        train(model, optimizer, [1])
        for name, energy in zip(SHAPES, asked[0], strict=True):
            sums[name] += energy / draws
    for name in SHAPES:  # a draw's deviation is at most 0.71, as of gradients of rank 1
        assert sums[name] == pytest.approx(wanted[name], rel=4 * 0.71 / draws**0.5), name


def test_a_clip_hardly_sees_them():
    norms = []
    for probes in (0, 4):
        model, allocator = spectral(probes=probes, max_rank=8)
        optimizer = torch.optim.AdamW(trained(model), 0.02)
        allocator.attach(optimizer)
        train(model, optimizer, range(7))  # the step before an event
        assert model.wide.rank == 3 + probes
        model.zero_grad()
        model.loss(7).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained(model)]).item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and norms[0] > 0


@pytest.mark.parametrize("growth", ["least", "gradient"])
def test_a_training_with_them(growth):
    model, allocator = spectral(total_steps=160, final_steps=60, probes=2, growth=growth)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    budget = cost_of(model)
    losses = train(model, optimizer, range(160))
    assert losses[-1] < 0.5 * losses[0]
    assert cost_of(model) + allocator.bank == budget
    assert allocator.ranks["wide"] > allocator.ranks["narrow"]
    assert allocator.ranks == {layer.name: layer.rank for layer in rw.summary(model).layers}


def test_the_model_computes_the_same_with_them(tmp_path):
    model, allocator = spectral(probes=2)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    train(model, optimizer, range(7))
    assert {layer.name: layer.rank for layer in rw.summary(model).layers}["wide"] == 5
    assert allocator.ranks == dict.fromkeys(SHAPES, 3) and allocator.bank == 0
    with_probes = model.loss(9)
    rw.save_adapter(model, tmp_path)
    loaded = Planted()
    rw.load_adapter(loaded, tmp_path)
    taken = rw.apply_lora(Planted(), config(probes=2))
    taken.load_state_dict(model.state_dict())
    merged = copy.deepcopy(model)
    rw.merge(merged)
    allocator.detach()
    assert model.wide.rank == 3
    assert torch.equal(model.loss(9), with_probes)
    for other in (loaded, taken):
        assert torch.equal(other.loss(9), with_probes)
    torch.testing.assert_close(merged.eval().loss(9), with_probes)
    again = rw.SpectralAllocator(model, config(probes=2))
    assert again.ranks == dict.fromkeys(SHAPES, 3)


def test_what_they_need():
    with pytest.raises(ValueError, match="growth must be one of .*, got 'best'"):
        config(growth="best")
    with pytest.raises(ValueError, match="probes must be at least 1 for growth by the gradient"):
        config(growth="gradient")
    with pytest.raises(ValueError, match="kth_least must be at least 1, got 0"):
        config(kth_least=0)
    model, allocator = spectral(probes=2)
    optimizer = torch.optim.Adamax(trained(model))
    allocator.attach(optimizer)
    with pytest.raises(RuntimeError, match="optimizer's state of 'narrow' cannot follow"):
        train(model, optimizer, range(8))
