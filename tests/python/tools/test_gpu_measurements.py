"""The measurements that a GPU gets, tiny and on the CPU."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench import group, kernels, layers_cuda, llama_contenders, llama_step, measurement
from bench.__main__ import main
from gpu import measure
from torch.autograd import DeviceType


def results(name: str, folder, *options: str):
    main([name, *options, "--repeats", "2", "--threads", "1", "--output", str(folder)])
    return json.loads((folder / f"{name}.json").read_text())["results"]


def test_a_llama_step_has_time_and_memory_of_all_contenders(tmp_path, capsys):
    found = results("llama_step", tmp_path)
    assert found["size"]["name"] == "tiny" and found["unfinished"] == []
    assert list(found["parts"]) == list(llama_step.PARTS)
    printed = capsys.readouterr().out
    for title, (makers, _) in llama_step.PARTS.items():
        part = found["parts"][title]
        names = {"frozen", *makers}
        assert part["left out"] == {} and part["steps"].keys() == part["peak bytes"].keys() == names
        assert f"{title}: one step of Llama tiny, 2 x 16 tokens" in printed
        assert part["steps"]["frozen"]["ratio"] == 1.0
        assert min(part["peak bytes"].values()) > 2**10
    (rows,) = measure.rows({"llama_step": found}).values()
    assert len(rows) == 1 + sum(2 + len(makers) for makers, _ in llama_step.PARTS.values())
    assert rows[2].startswith("  frozen ") and " 1.000 of frozen (1.000 .. 1.000)" in rows[2]


def test_parts_for_which_no_time_is_left_are_named(tmp_path, monkeypatch):
    now = iter([0.0, 5.0, 11.0, 12.0])
    monkeypatch.setattr(measurement.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(llama_step, "measure", lambda *given: {"left out": {}})
    monkeypatch.setattr(llama_step, "table", lambda title, found: title)
    found = results("llama_step", tmp_path, "--limit", "10")
    assert list(found["parts"]) == ["LoRA"]
    assert found["unfinished"] == list(llama_step.PARTS)[1:]


@pytest.fixture(scope="module")
def task():
    return llama_contenders.Task.of(llama_contenders.SIZES["tiny"], "cpu")


def test_contenders_share_the_base_and_begin_alike(task):
    theirs, ours = (llama_contenders.LORA[n](task, 0.0) for n in list(llama_contenders.LORA)[1:4:2])
    for step in (theirs, ours):
        held = {p.data_ptr() for p in step.model.parameters()}
        assert {p.data_ptr() for p in task.model.parameters()} <= held
    first, second = (llama_contenders.factors(step.model) for step in (theirs, ours))
    assert first.keys() == second.keys() and len(first) == 2 * 7 * 2
    for name, factor in first.items():
        assert factor.dtype == torch.float32 and torch.equal(factor, second[name])


def test_other_gradients_are_found_out(task):
    make = llama_contenders.LORA["rankwise, fp32 factors"]
    same, other = make(task, 0.0), make(task, 0.0)
    llama_contenders.check({"PEFT": same, "ours": same})
    doubled = replace(other, loss=lambda: 1.2 * other.loss())
    with pytest.raises(AssertionError, match="ours: gradients must be those of PEFT"):
        llama_contenders.check({"PEFT": same, "ours": doubled})


def test_a_contender_that_fails_is_left_out(task):
    def fails(task, dropout):
        raise MemoryError("no room\nfor it")

    frozen_alone = llama_step.measure(task, {"PEFT": fails}, 0.0, repeats=2)
    assert frozen_alone["steps"].keys() == {"frozen"}
    assert frozen_alone["left out"] == {"PEFT": "MemoryError: no room"}


def test_a_part_that_fails_leaves_the_others_and_the_program_fails(tmp_path, monkeypatch):
    def fails(task, dropout):
        raise ValueError

    monkeypatch.setitem(llama_step.PARTS, "LoRA", ({"rankwise": fails}, 0.0))
    with pytest.raises(SystemExit, match="failed: LoRA"):
        results("llama_step", tmp_path, "--parts", "LoRA", "AdaLoRA")
    found = json.loads((tmp_path / "llama_step.json").read_text())["results"]
    assert found["failed"] == {"LoRA": "ValueError: "} and list(found["parts"]) == ["AdaLoRA"]


def test_layers_that_are_not_exact_are_named(tmp_path, monkeypatch):
    def check(case, device):
        assert case.dropout, "error of y\nis large"

    row = {"left out": {}, "both": {}, "case": vars(layers_cuda.cases(1, 1)[0])}
    monkeypatch.setattr(layers_cuda, "warm_up", lambda: None)
    monkeypatch.setattr(layers_cuda, "check", check)
    monkeypatch.setattr(layers_cuda, "measure", lambda *given: row)
    monkeypatch.setattr(layers_cuda, "host_times", dict)
    given = ["layers_cuda", "--shapes", "1", "--ranks", "1", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: 8192, 4096 -> 4096, r 16, bfloat16, dropout 0, "):
        main(given)
    found = json.loads((tmp_path / "layers_cuda.json").read_text())["results"]
    assert len(found["cases"]) == len(found["failed"]) == 2
    assert set(found["failed"].values()) == {"AssertionError: error of y"}


def test_a_group_has_the_frozen_layers_beside(tmp_path, monkeypatch):
    monkeypatch.setitem(group.SHAPES, "cpu", ((8, 16, 2),))
    found = results("group", tmp_path)
    for each in found:
        assert each["rows"].keys() == {"one by one", "as a group", "share_inputs", "frozen"}
    (rows,) = measure.rows({"group": found}).values()
    assert len(rows) == 2 and rows[0].startswith("8 x 16 x 16, rank 2, float32: one by one ")


def test_kernels_of_a_layer(tmp_path):
    found = results("kernels", tmp_path, "--device", "cpu")
    ours = {row["kernel"]: row["count"] for row in found["cases"][1]["kernels"]}
    assert found["cases"][0]["contender"] == "frozen"
    assert not any(row["kernel"].startswith("rankwise::") for row in found["cases"][0]["kernels"])
    assert ours["rankwise::_lora_linear_forward"] == ours["rankwise::_lora_linear_backward"] == 1
    (rows,) = measure.rows({"kernels": found}).values()
    assert rows[0].startswith("frozen, 64, 48 -> 32, r 4, bfloat16, p 0.1: ") and len(rows) == 9


def test_layers_have_a_row_each():
    def timed(ratio: float) -> dict:
        return {"ratio": ratio, "median": 0.5}

    case = dict(tokens=8, n_in=4, n_out=2, rank=1, dtype="bfloat16", dropout=0.1)
    both = {"frozen": timed(1), "PEFT": timed(1.75), "rankwise": timed(1.254)}
    row = {"case": case, "both": both, "graph": {"rankwise": timed(1.2)}}
    found = {"cases": [row], "host": {"rankwise": 422.4}, "unfinished": ["another"]}
    found["failed"] = {"one more": "AssertionError: error of y"}
    assert measure.layer_rows(found) == [
        "8, 4 -> 2, r 1, bfloat16, p 0.1: frozen 500 us; PEFT 1.75/-; rankwise 1.25/1.20",
        "host us: rankwise 422",
        "failed: one more: AssertionError: error of y",
        "no time was left for another",
    ]


def test_times_of_kernels_are_those_of_one_call():
    def event(name, microseconds, where=DeviceType.CUDA):
        return SimpleNamespace(name=name, device_type=where, device_time_total=microseconds)

    events = [event("a", 3.0), event("b", 40.0), event("a", 5.0), event("aten::mm", 9, "CPU")]
    assert kernels.of_device(events, "cuda", calls=2) == [
        {"kernel": "b", "short": "b", "microseconds": 20.0, "count": 0.5},
        {"kernel": "a", "short": "a", "microseconds": 4.0, "count": 1.0},
    ]


@pytest.mark.parametrize(
    "name, left",
    [
        ("nvjet_tst_256x128_64x4", "nvjet_tst_256x128_64x4"),
        ("void at::native::elementwise<4>(int)", "elementwise<4>(int)"),
        (
            "void rankwise::kernels::(anonymous namespace)::expand<rankwise::kernels::Types<float>"
            ", 16, rankwise::kernels::(anonymous namespace)::Masked>(int)",
            "expand<Types<float>, 16, Masked>(int)",
        ),
    ],
)
def test_short_names(name, left):
    assert kernels.short(name) == left
