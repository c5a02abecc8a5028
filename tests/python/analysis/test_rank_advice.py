# Advice on ranks: the patterns that rankwise and PEFT take, the evidence, and what is refused.
import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankwise as rw
from rankwise.analysis import DirectionScores, MatrixScores, Update, rank_advice

# Names of which each is a part or a near miss of another.
NAMES = ["0", "block.0", "layer.1", "layer.11", "layer.111", "layer_1", "deep.layer.1", "a-b.c+d"]


def nested(names, size=8):
    """A model with a linear layer under each dotted name."""
    model = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        place = model
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place._modules[parent]
        place.add_module(last, nn.Linear(size, size))
    return model


def theirs_of(model, **options):
    """{module: rank} that PEFT makes."""
    found = peft.inject_adapter_in_model(peft.LoraConfig(**options), copy.deepcopy(model))
    layers = dict(found.named_modules())
    return {name: m.r["default"] for name, m in layers.items() if hasattr(m, "lora_A")}


@settings(max_examples=15, deadline=None)
@given(st.permutations(NAMES), st.lists(st.integers(0, 8), min_size=8, max_size=8), st.booleans())
def test_rankwise_and_peft_give_the_ranks_that_are_advised(names, wanted, shuffled):
    model = nested(names if shuffled else NAMES)
    scores = {n: float(r) for n, r in zip(names, wanted, strict=True)}
    evidence = MatrixScores(scores, dict.fromkeys(names, (8, 8)))
    if not any(wanted):
        return
    advice = rank_advice(evidence, budget=16 * sum(wanted), min_rank=0)
    assert advice.ranks == dict(zip(names, wanted, strict=True))
    given = {name: rank for name, rank in advice.ranks.items() if rank}
    regex = r".*(0|1|_1|d)"
    options = dict(target_modules=regex, exclude_modules=advice.exclude_modules)
    assert theirs_of(model, r=3, rank_pattern=advice.rank_pattern, **options) == given
    config = rw.LoRAConfig(
        rank=3, rank_pattern=advice.rank_pattern, alpha_pattern=advice.alpha_pattern(2.0), **options
    )
    layers = rw.summary(rw.apply_lora(model, config)).layers
    assert {layer.name: layer.rank for layer in layers} == given
    assert {layer.scaling for layer in layers} == {2.0}


def test_a_folder_of_advised_ranks_is_read_back(tmp_path):
    model = nested(NAMES)
    evidence = MatrixScores({n: 1.0 + i for i, n in enumerate(NAMES)}, dict.fromkeys(NAMES, (8, 8)))
    advice = rank_advice(evidence, mean_rank=3)
    config = peft.LoraConfig(r=1, rank_pattern=advice.rank_pattern, target_modules=r".*(0|1|d)")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    rw.load_adapter(model, tmp_path)
    assert {layer.name: layer.rank for layer in rw.summary(model).layers} == advice.ranks


def update(*values, size=6, other=6):
    torch.manual_seed(len(values))
    U, V = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (other, size))
    rank = len(values)
    return Update(V[:, :rank].t(), U[:, :rank] * torch.tensor(values, dtype=torch.float64))


def test_energies_give_the_least_loss_of_all_truncations(tmp_path):
    """Against every choice of ranks, on the dense updates."""
    model = nested("abc", 6)
    rw.apply_lora(model, rw.LoRAConfig(rank=3, alpha=3.0, target_modules=["a", "b", "c"]))
    spectra = {"a": (3.0, 0.1, 0.05), "b": (2.0, 1.5, 1.0), "c": (0.2, 0.0, 0.0)}
    with torch.no_grad():
        for name, values in spectra.items():
            found, layer = update(*values), model.get_submodule(name)
            layer.lora_A.copy_(found.lora_A), layer.lora_B.copy_(found.lora_B)
    rw.save_adapter(model, tmp_path)
    for source in (model, tmp_path):
        evidence = rw.analysis.update_energies(source)
        ranks = rank_advice(evidence, budget=12 * 4, min_rank=0).ranks
        assert ranks == {"a": 1, "b": 3, "c": 0}
    assert rank_advice(evidence, budget=12 * 4).ranks == {"a": 1, "b": 2, "c": 1}
    everything = rank_advice(evidence, budget=10**6)
    assert everything.ranks == {"a": 3, "b": 3, "c": 3}  # an adapter tells of its own rank alone
    assert everything.spent == 12 * 9


def planted(seed, shared, rank, size):
    """Directions of one subspace that all seeds have, and random ones after them."""
    torch.manual_seed(99)
    common = torch.linalg.qr(torch.randn(size, shared))[0]
    torch.manual_seed(seed)
    mixed = common @ torch.linalg.qr(torch.randn(shared, shared))[0]
    rest = torch.randn(size, rank - shared)
    V = torch.linalg.qr(torch.cat([mixed, rest - common @ (common.t() @ rest)], dim=1))[0]
    falling = torch.linspace(2.0, 1.0, rank)
    return Update(V.t(), torch.linalg.qr(torch.randn(size, rank))[0] * falling)


@pytest.mark.parametrize("shared", [0, 1, 5])
def test_agreement_counts_what_seeds_share(shared):
    first, second = planted(1, shared, 8, 200), planted(2, shared, 12, 200)
    found = rw.analysis.agreement(first, second)
    assert found.directions == pytest.approx(shared, abs=0.5)
    assert found.chance == 8 * 12 / 200
    assert found.overlap == pytest.approx(shared + (8 - shared) * (12 - shared) / 200, abs=0.3)
    assert rw.analysis.agreement(first, second, "output").directions <= 0.5
    assert rw.analysis.agreement(first, first).directions == 8


def test_chance_is_that_of_random_subspaces():
    first = [planted(seed, 0, 4, 60) for seed in range(40)]
    found = [rw.analysis.agreement(a, b) for a, b in zip(first[::2], first[1::2], strict=True)]
    mean = sum(own.overlap for own in found) / len(found)
    assert mean == pytest.approx(found[0].chance, rel=0.25)
    assert sum(own.directions for own in found) / (4 * len(found)) < 0.05


def test_nothing_is_told_where_subspaces_fill_the_space():
    full = planted(1, 0, 6, 6), planted(2, 0, 6, 6)
    assert rw.analysis.agreement(*full).directions == 0
    empty = Update(torch.zeros(2, 6), torch.zeros(6, 2))
    assert rw.analysis.agreement(empty, full[0]) == rw.analysis.Agreement(0, 0.0, 0.0)


def test_agreement_of_folders(tmp_path):
    folders, shared = [tmp_path / "1", tmp_path / "2"], {"a": 4, "b": 1}
    for seed, folder in enumerate(folders):
        model = nested("ab", 64)
        rw.apply_lora(model, rw.LoRAConfig(rank=6, alpha=6.0, target_modules=["a", "b"]))
        with torch.no_grad():
            for name, count in shared.items():
                found, layer = planted(seed, count, 6, 64), model.get_submodule(name)
                layer.lora_A.copy_(found.lora_A), layer.lora_B.copy_(found.lora_B)
        rw.save_adapter(model, folder)
    evidence = rw.analysis.seed_agreement(*folders)
    assert evidence.scores == pytest.approx(shared, abs=0.5)
    assert rank_advice(evidence, mean_rank=5).ranks == {"a": 8, "b": 2}
    rw.save_adapter(rw.apply_lora(nested("a"), rw.LoRAConfig(target_modules=["a"])), folders[1])
    with pytest.raises(ValueError, match="the same modules, got 'b' in one alone"):
        rw.analysis.seed_agreement(*folders)


@pytest.mark.parametrize("spectral", [False, True])
def test_ranks_of_an_allocator(spectral):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    options = dict(total_steps=4, allocation_interval=2, target_modules="all-linear")
    if spectral:
        config = rw.SpectralConfig(initial_rank=2, hysteresis=0.0, min_age=0, **options)
        allocator = rw.SpectralAllocator(rw.apply_lora(model, config), config)
    else:
        config = rw.AdaLoRAConfig(initial_rank=3, target_rank=1, **options)
        allocator = rw.RankAllocator(rw.apply_lora(model, config), config)
    assert set(rw.analysis.allocated_ranks(allocator).scores.values()) == {2 if spectral else 3}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    assert len(allocator.history) == 2
    evidence = rw.analysis.allocated_ranks(allocator)
    assert evidence.scores == allocator.ranks == dict(
        zip(map(str, range(12)), allocator.history[-1].ranks, strict=True)
    )  # fmt: skip
    both = rw.analysis.allocated_ranks(allocator, events=9).scores
    for name, own in zip(
        both, zip(*(e.ranks for e in allocator.history), strict=True), strict=True
    ):
        assert both[name] == sum(own) / 2
    budget = 16 * sum(allocator.ranks.values())
    assert rank_advice(evidence, budget=budget, min_rank=0).ranks == allocator.ranks


def test_ranks_of_pefts_allocator():
    from rankwise.integrations.peft import accelerate

    options = dict(init_r=4, target_r=2, total_step=4, tinit=0, tfinal=1, deltaT=1)
    model = nested(["deep.layer.1", "0"])
    config = peft.AdaLoraConfig(target_modules=["layer.1", "0"], **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    accelerate(theirs)
    evidence = rw.analysis.allocated_ranks(theirs.base_model.rankallocator)
    pattern = rank_advice(evidence, mean_rank=2).rank_pattern
    assert theirs_of(model, rank_pattern=pattern, target_modules=["layer.1", "0"]) == {
        "deep.layer.1": 2, "0": 2,
    }  # fmt: skip


def test_a_table():
    evidence = MatrixScores({"q": 3.0, "head": 1.0}, {"q": (100, 100), "head": (2, 100)})
    advice = rank_advice(evidence, budget=2000)
    assert str(advice) == (
        "module   out x in  rank  parameters  score\n"
        "q       100 x 100     8       1,600      3\n"
        "head      2 x 100     2         204      1\n"
        "1,804 of 2,000 parameters"
    )
    assert advice.exclude_modules is None and advice.alpha_pattern(2)["q"] == 16


SIZES = {"a": (4, 4), "b": (2, 9)}
ALIKE = MatrixScores(dict.fromkeys(SIZES, 1.0), SIZES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rank_advice(ALIKE), "one of budget and mean_rank must be given, got budget=None"),
        (lambda: rank_advice(ALIKE, budget=1, mean_rank=1), "one of budget and mean_rank"),
        (lambda: rank_advice(ALIKE, budget=18), "budget must be at least 19, which .*, got 18"),
        (lambda: rank_advice(ALIKE, budget=9.5), "budget must be an integer, got 9.5"),
        (lambda: rank_advice(ALIKE, mean_rank=0), "mean_rank must be a number > 0, got 0"),
        (lambda: rank_advice(ALIKE, budget=99, min_rank=-1), "min_rank must be >= 0, got -1"),
        (lambda: rank_advice(ALIKE, budget=99, min_rank=3, max_rank=2), "max_rank must be an"),
        (lambda: MatrixScores({"a": -1.0}, {"a": (2, 2)}), "'a' must be finite numbers >= 0"),
        (lambda: MatrixScores({"a": float("nan")}, {"a": (2, 2)}), "must be finite numbers >= 0"),
        (lambda: MatrixScores({"a": 1.0}, SIZES), r"sizes must be of the modules \['a'\]"),
        (lambda: MatrixScores({}, {}), "sizes must be of the modules"),
        (lambda: DirectionScores({"a": [1.0, 2.0]}, {"a": (2, 2)}), "'a' must be falling"),
        (lambda: rw.analysis.allocated_ranks(None), "must be a RankAllocator or a SpectralAlloc"),
        (lambda: rank_advice({"a": 1.0}, budget=9), "evidence must be MatrixScores or Direction"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
