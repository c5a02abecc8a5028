# Distances and folders against dense updates.
import numpy as np
import pytest
import torch
from dense import dense, factor_pairs, norm, shapes
from hypothesis import given
from hypothesis import strategies as st

import rankwise as rw
from rankwise import analysis
from rankwise.analysis import Distance, Update


@st.composite
def pairs(draw):
    shape = draw(shapes())
    return draw(factor_pairs(shape)), draw(factor_pairs(shape))


@given(pairs())
def test_the_distance_is_the_dense_one(pair):
    one, two = map(dense, pair)
    found = analysis.distance(*pair)
    larger = max(norm(one), norm(two))
    assert found.absolute == pytest.approx(norm(one - two), abs=1e-10 * max(larger, 1e-3))
    wanted = norm(one - two) / larger if larger else 0
    assert found.relative == pytest.approx(wanted, abs=1e-10) and found.relative <= 2 + 1e-12
    assert analysis.distance(*pair[::-1]).absolute == pytest.approx(found.absolute, abs=1e-12)


def test_another_basis_is_the_same_update():
    one = Update(torch.randn(4, 9).double(), torch.randn(7, 4).double(), None, 0.5)
    mix = torch.randn(4, 4).double()
    two = Update(torch.linalg.solve(mix, one.lora_A), 0.5 * one.lora_B @ mix)
    assert analysis.distance(one, two).relative < 1e-13


@given(factor_pairs())
def test_an_update_is_no_distance_from_itself(update):
    assert analysis.distance(update, update) == Distance(0, 0)


def test_small_differences_are_seen():
    one = Update(torch.randn(4, 90).double(), torch.randn(70, 4).double())
    two = Update(one.lora_A, one.lora_B.clone())
    two.lora_B[3, 2] += 1e-9
    wanted = 1e-9 * one.lora_A[2].norm().item()
    assert analysis.distance(one, two).absolute == pytest.approx(wanted, rel=1e-4)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(10, 6)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)
        self.head = torch.nn.Linear(4, 2)


def lora(seed: int, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    net = Net()
    torch.manual_seed(seed)
    options = {"rank": 3, "alpha": 6.0, "target_modules": ["words", "up", "down"]} | options
    rw.apply_lora(net, rw.LoRAConfig(**options))
    return randomised(net)


def adalora(seed: int) -> torch.nn.Module:
    torch.manual_seed(0)
    net = Net()
    torch.manual_seed(seed)
    config = rw.AdaLoRAConfig(
        initial_rank=4, target_rank=2, total_steps=9, alpha=8.0, target_modules=["up", "down"]
    )
    return randomised(rw.apply_lora(net, config))


def randomised(net):
    for name, parameter in net.named_parameters():
        if name.split(".")[-1] in ("lora_A", "lora_B", "lora_E"):
            torch.nn.init.normal_(parameter)
    return net


def folder(path, model):
    rw.save_adapter(model, path)
    return path


def test_updates_are_found_in_models_and_folders(tmp_path):
    pruned = adalora(4)
    pruned.up.rank = 3
    with torch.no_grad():
        for factor in (pruned.up.lora_A, pruned.up.lora_B.t(), pruned.up.lora_E):
            factor[3:] = 0
    for name, model in {"lora": lora(1), "adalora": adalora(2), "pruned": pruned}.items():
        there, stored = analysis.updates(model), analysis.updates(folder(tmp_path / name, model))
        assert there.keys() == stored.keys()
        for module, update in there.items():
            assert update.module == module and update.embedding == (module == "words")
            torch.testing.assert_close(update.dense(), stored[module].dense(), rtol=1e-6, atol=0)
            layer = model.get_submodule(module)
            E = 1 if layer.lora_E is None else layer.lora_E
            wanted = layer.scaling * layer.lora_B @ (E * layer.lora_A)
            torch.testing.assert_close(update.dense().float(), wanted.detach())


def test_updates_of_a_named_adapter_and_of_its_rank():
    model = adalora(1)
    rw.add_adapter(model, "other", rw.LoRAConfig(rank=2, target_modules=["head"]))
    assert list(analysis.updates(model, "other")) == ["head"]
    model.up.rank = 3
    assert {m: u.rank for m, u in analysis.updates(model).items()} == {"up": 3, "down": 4}
    assert repr(analysis.updates(model)["up"]) == "Update('up', [8, 6], rank 3, scaling 2)"
    with pytest.raises(ValueError, match="updates: adapters are .*, got 'none'"):
        analysis.updates(model, "none")
    with pytest.raises(TypeError, match="updates: source must be a folder or a model, got int"):
        analysis.updates(3)


def test_an_adapter_and_its_export_are_the_same_function(tmp_path):
    model = adalora(3)
    rw.save_adapter(model, tmp_path / "adalora")
    rw.export_lora(model, tmp_path / "lora")
    found = analysis.same_function(tmp_path / "adalora", tmp_path / "lora")
    assert found and found.differing == {} and str(found) == "the same function"


def test_modules_that_differ_are_named(tmp_path):
    model = lora(1)
    one = folder(tmp_path / "one", model)
    model.up.lora_A.data *= 1.01
    two = folder(tmp_path / "two", model)
    found = analysis.same_function(one, two)
    assert not found and list(found.differing) == ["up"]
    assert found.differing["up"].relative == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert str(found).startswith("another function:\n  up: relative distance 0.0099")
    assert analysis.same_function(one, two, tolerance=0.02)
    assert list(analysis.distances(one, two)) == ["down", "up", "words"]


def test_a_module_that_is_missing_adds_nothing(tmp_path):
    model = lora(1)
    model.down.lora_B.data.zero_()
    all_three = folder(tmp_path / "all", model)
    rest = lora(1, target_modules=["words", "up"])
    for name in ("words", "up"):
        for factor in ("lora_A", "lora_B"):
            getattr(rest.get_submodule(name), factor).data = getattr(
                model.get_submodule(name), factor
            ).data
    two = folder(tmp_path / "two", rest)
    assert analysis.same_function(all_three, two)
    torch.nn.init.ones_(model.down.lora_B)
    all_three = folder(tmp_path / "more", model)
    found = analysis.same_function(two, all_three)
    assert list(found.differing) == ["down"] and found.differing["down"].relative == 1


def test_weights_trained_whole_count(tmp_path):
    plain, model = lora(1), lora(1, modules_to_save=["head"])
    for name in ("words", "up", "down"):
        for factor in ("lora_A", "lora_B"):
            getattr(model.get_submodule(name), factor).data = getattr(
                plain.get_submodule(name), factor
            ).data.clone()
    one, two = folder(tmp_path / "one", plain), folder(tmp_path / "two", model)
    infinite = Distance(float("inf"), float("inf"))
    found = analysis.same_function(one, two)
    assert found.differing == {"head.bias": infinite, "head.weight": infinite}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if p.shape == (2, 4)).mul_(2)
    three = folder(tmp_path / "three", model)
    found = analysis.same_function(two, three)
    assert list(found.differing) == ["head.weight"]
    assert found.differing["head.weight"].relative == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_a_head_with_nan_is_no_function(tmp_path):
    model = lora(1, modules_to_save=["head"])
    next(p for p in model.parameters() if p.shape == (2, 4) and p.requires_grad).data[0] = np.nan
    one = folder(tmp_path / "one", model)
    assert list(analysis.same_function(one, one).differing) == ["head.weight"]


def test_other_shapes_are_another_function(tmp_path):
    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 9)

    wide = randomised(rw.apply_lora(Wide(), rw.LoRAConfig(rank=3, target_modules=["up"])))
    narrow = lora(1, target_modules=["up"])
    found = analysis.same_function(folder(tmp_path / "a", wide), folder(tmp_path / "b", narrow))
    assert found.differing == {"up": Distance(float("inf"), float("inf"))}


def test_an_adapter_with_nan_is_refused_by_name(tmp_path):
    model = lora(1)
    model.up.lora_B.data[0, 0] = float("nan")
    one = folder(tmp_path / "one", model)
    with pytest.warns(UserWarning, match="NaN"), pytest.raises(ValueError, match="'up'.* finite"):
        analysis.same_function(one, one)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(rw.FileError, match="cannot open the folder"):
        analysis.same_function(tmp_path / "none", tmp_path / "none")
    with pytest.raises(TypeError, match="distances: first must be a folder, got Net"):
        analysis.distances(Net(), tmp_path)
    with pytest.raises(ValueError, match="same_function: tolerance must be >= 0, got -1"):
        analysis.same_function(tmp_path, tmp_path, tolerance=-1)


def test_distances_of_updates_of_other_shapes_are_refused():
    one, two = (
        Update(torch.ones(1, 2), torch.ones(3, 1)),
        Update(torch.ones(1, 3), torch.ones(2, 1)),
    )
    with pytest.raises(
        ValueError,
        match=r"distance: second must be an update of \[3, 2\] like first, got .*\[2, 3\]",
    ):
        analysis.distance(one, two)


def test_rank_0_is_the_zero_update():
    none, one = (
        Update(torch.ones(0, 5), torch.ones(4, 0)),
        Update(torch.ones(1, 5), torch.ones(4, 1)),
    )
    assert analysis.distance(none, none) == Distance(0, 0)
    assert analysis.distance(none, one).relative == 1
    assert np.isclose(analysis.distance(one, none).absolute, norm(dense(one)))


def test_no_dense_update_is_formed():
    """It would have 480 GB."""
    one = Update(torch.randn(2, 200_000).double(), torch.randn(300_000, 2).double())
    less = analysis.truncate(one, 1)
    found = analysis.distance(one, less.update)
    assert found.absolute == pytest.approx(less.error, rel=1e-10)
    assert analysis.combine([one, one], [1.0, -0.5]).update.rank == 2
    assert analysis.subspace_similarity(one, less.update)[1, 0] == pytest.approx(1)
