# combine_folders: what the folders compute, and that PEFT reads the result.
import copy

import peft
import pytest
import torch
from test_distances import Net, adalora, folder, lora

import rankwise as rw
from rankwise import analysis


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return Net()


def wanted(folders, weights) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for path, weight in zip(folders, weights, strict=True):
        for module, update in analysis.updates(path).items():
            total[module] = total.get(module, 0) + weight * update.dense()
    return total


def test_lora_of_other_ranks_and_adalora_become_one_folder(tmp_path):
    models = [lora(1), lora(2, rank=2, alpha=1.0, rslora=True, target_modules=["up"]), adalora(3)]
    folders = [folder(tmp_path / str(i), model) for i, model in enumerate(models)]
    weights = [0.5, -1.0, 2.0]
    analysis.combine_folders(folders, weights, tmp_path / "sum")
    found, total = analysis.updates(tmp_path / "sum"), wanted(folders, weights)
    assert found.keys() == total.keys() == {"words", "up", "down"}
    for module, update in found.items():
        torch.testing.assert_close(update.dense(), total[module], rtol=0, atol=1e-5)
        assert update.lora_A.dtype == torch.float32
    assert {update.rank for update in found.values()} == {6}, (
        "3 of lora(1) and 4 of AdaLoRA in [8, 6]"
    )
    plain = base()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "sum")
    x = torch.randn(5, 6)
    up = plain.up(x) + x @ total["up"].float().t()
    torch.testing.assert_close(theirs.base_model.model.up(x), up, rtol=1e-5, atol=1e-4)


def test_float64_folders_are_combined_exactly(tmp_path):
    models = [lora(seed, target_modules=["up", "down"]) for seed in (1, 2)]
    folders = [folder(tmp_path / str(i), model.double()) for i, model in enumerate(models)]
    analysis.combine_folders(folders, [0.3, 0.7], tmp_path / "sum")
    for module, dense in wanted(folders, [0.3, 0.7]).items():
        found = analysis.updates(tmp_path / "sum")[module]
        assert found.lora_A.dtype == torch.float64
        torch.testing.assert_close(found.dense(), dense, rtol=0, atol=1e-12)


def test_one_folder_with_a_rank_is_its_truncation(tmp_path):
    one = folder(tmp_path / "one", lora(1))
    analysis.combine_folders([one], [1.0], tmp_path / "less", rank=2)
    for module, distance in analysis.distances(one, tmp_path / "less").items():
        exact = analysis.truncate(analysis.updates(one)[module], 2)
        assert distance.absolute == pytest.approx(exact.error, rel=1e-5)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("svd", "linear"),
        ("cat", "linear"),
        ("ties_svd", "ties"),
        ("magnitude_prune_svd", "magnitude_prune"),
    ],
)
def test_the_methods_are_those_of_pefts_models(tmp_path, theirs, ours):
    config = dict(target_modules=["up", "down"], init_lora_weights=False)
    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, lora_alpha=3, **config), "one")
    model.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, **config))
    weights, density = [0.5, -1.5], None if ours == "linear" else 0.6
    model.add_weighted_adapter(
        ["one", "two"], weights, "sum", combination_type=theirs, svd_rank=4, density=density
    )
    model.save_pretrained(tmp_path)
    options = {} if theirs == "cat" else {"rank": 4, "density": density or 0.5}
    folders = [tmp_path / "one", tmp_path / "two"]
    analysis.combine_folders(folders, weights, tmp_path / "ours", method=ours, **options)
    for module, distance in analysis.distances(tmp_path / "sum", tmp_path / "ours").items():
        assert distance.relative < 1e-6, module


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_methods_on_elements(tmp_path, method):
    folders = [folder(tmp_path / str(i), lora(i)) for i in range(2)]
    options = dict(method=method, rank=8, density=0.5, seed=3)
    analysis.combine_folders(folders, [1.0, 0.5], tmp_path / "sum", **options)
    analysis.combine_folders(folders, [1.0, 0.5], tmp_path / "again", **options)
    assert analysis.same_function(tmp_path / "sum", tmp_path / "again", tolerance=0)
    if method in ("ties", "magnitude_prune"):
        both = [analysis.updates(path)["up"] for path in folders]
        exact = analysis.combine(both, [1.0, 0.5], **options).update
        found = analysis.updates(tmp_path / "sum")["up"]
        torch.testing.assert_close(found.dense(), exact.dense(), rtol=0, atol=1e-5)


def test_dare_drops_other_elements_in_each_module(tmp_path):
    class Twins(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)

    model = rw.apply_lora(Twins(), rw.LoRAConfig(rank=2, target_modules=["a", "b"]))
    for factor in ("lora_A", "lora_B"):
        value = torch.randn_like(getattr(model.a, factor))
        for layer in (model.a, model.b):
            getattr(layer, factor).data.copy_(value)
    one = folder(tmp_path / "one", model)
    analysis.combine_folders([one], [1.0], tmp_path / "sum", method="dare_linear", rank=6)
    a, b = analysis.updates(tmp_path / "sum").values()
    assert (a.dense() - b.dense()).abs().max() > 0.1


def test_a_head_that_all_share_is_kept_and_another_refused(tmp_path):
    head = dict(modules_to_save=["head"])
    folders = [folder(tmp_path / "2", lora(2))]  # the first one has none
    folders += [folder(tmp_path / str(i), lora(i, **head)) for i in range(2)]
    analysis.combine_folders(folders, [1.0, 1.0, 1.0], tmp_path / "sum")
    report = rw.load_adapter(base(), tmp_path / "sum")
    assert report.missing == report.unexpected == []
    assert peft.PeftConfig.from_pretrained(tmp_path / "sum").modules_to_save == ["head"]


@pytest.mark.parametrize(
    "change", [torch.Tensor.double, lambda head: head + 1], ids=["dtype", "values"]
)
def test_heads_that_differ_are_refused(tmp_path, change):
    models = [lora(i, modules_to_save=["head"]) for i in range(2)]
    head = next(p for p in models[1].parameters() if p.shape == (2, 4) and p.requires_grad)
    head.data = change(head.data)
    folders = [folder(tmp_path / str(i), model) for i, model in enumerate(models)]
    with pytest.raises(ValueError, match="must be equal in all .*, got another '.*head.weight'"):
        analysis.combine_folders(folders, [1.0, 1.0], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_cancels_is_left_out_and_nothing_at_all_is_refused(tmp_path):
    model = lora(1)
    one = folder(tmp_path / "one", model)
    model.up.lora_B.data.mul_(2)
    two = folder(tmp_path / "two", model)
    analysis.combine_folders([one, two], [1.0, -1.0], tmp_path / "rest")
    assert list(analysis.updates(tmp_path / "rest")) == ["up"]
    with pytest.raises(ValueError, match="every module has rank 0"):
        analysis.combine_folders([one, one], [1.0, -1.0], tmp_path / "none")


def test_errors_name_the_module(tmp_path):
    one = folder(tmp_path / "one", lora(1))

    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 9)

    wide = rw.apply_lora(Wide(), rw.LoRAConfig(rank=3, target_modules=["up"]))
    two = folder(tmp_path / "two", wide)
    with pytest.raises(ValueError, match=r"'up'\) must be an update of \[8, 6\]"):
        analysis.combine_folders([one, two], [1.0, 1.0], tmp_path / "none")
    with pytest.raises(ValueError, match="a weight for each, got 1 and 2"):
        analysis.combine_folders([one], [1.0, 1.0], tmp_path / "none")
    with pytest.raises(TypeError, match=r"combine_folders: folders\[0\] must be a folder, got int"):
        analysis.combine_folders([1], [1.0], tmp_path / "none")
