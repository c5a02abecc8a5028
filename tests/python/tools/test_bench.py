"""python -m bench lists its measurements, knows their options and writes what one of them found."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
from bench import MEASUREMENTS
from bench.__main__ import main
from bench.measurement import Measurement, number


def python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def tiny(monkeypatch):
    """A measurement that finds its options."""
    measurement = Measurement(
        lambda options: {"size": options.size, "repeats": options.repeats},
        repeats=9,
        quick={"repeats": 3, "size": 1},
        arguments={"--size": number(4, "of nothing")},
    )
    module = SimpleNamespace(MEASUREMENT=measurement, __doc__="Measures nothing.")
    monkeypatch.setitem(MEASUREMENTS, "tiny", "nothing")
    monkeypatch.setitem(sys.modules, "bench.tiny", module)


def test_the_help_lists_every_measurement(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    listed = " ".join(capsys.readouterr().out.split())
    for name, measured in MEASUREMENTS.items():
        assert f" {name} {measured}" in listed


def test_the_help_of_all_imports_none_of_them():
    code = "import sys, bench.__main__ as b; b.entry().format_help(); print('torch' in sys.modules)"
    assert python(code) == "False\n"


@pytest.mark.parametrize("given", ["layer", "training_step"])
def test_an_unknown_name_fails_with_the_names(given, capsys):
    with pytest.raises(SystemExit) as end:
        main([given, "--help"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"'{given}'" in error
    assert set(re.findall(r"\w+", error.partition("choose from")[2])) >= set(MEASUREMENTS)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_has_help_and_a_quick_variant(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: python -m bench {name} " in told
    module = import_module(f"bench.{name}")
    usual, quick = (
        vars(module.MEASUREMENT.options(name, module.__doc__, given)) for given in ([], ["--quick"])
    )
    assert usual.keys() == quick.keys()
    assert quick["repeats"] < usual["repeats"]
    assert all(f"--{option} " in told for option in usual)


def test_the_gpu_measurement_needs_no_peft_and_draws_nothing():
    absent = ("peft", "transformers", "matplotlib", "tqdm", "typer")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import bench.layers_cuda"
    assert python(code) == ""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], {"size": 4, "repeats": 9}),
        (["--quick"], {"size": 1, "repeats": 3}),
        (["--repeats", "7", "--quick"], {"size": 1, "repeats": 7}),
    ],
)
def test_results_are_written_with_the_options_they_are_of(tiny, given, found, tmp_path):
    main(["tiny", *given, "--output", str(tmp_path / "new"), "--threads", "1"])
    report = json.loads((tmp_path / "new" / "tiny.json").read_text())
    assert report["measurement"] == "tiny"
    assert report["results"] == found
    assert report["options"].items() >= (found | {"threads": 1}).items()


def test_json_names_the_file(tiny, tmp_path):
    main(["tiny", "--json", str(tmp_path / "a" / "b.json"), "--output", str(tmp_path / "c")])
    assert json.loads((tmp_path / "a" / "b.json").read_text())["results"]["size"] == 4
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("given", [["--repeats", "1"], ["--size", "0"], ["--size", "x"]])
def test_a_number_that_does_not_fit_is_refused(tiny, given, capsys):
    with pytest.raises(SystemExit) as end:
        main(["tiny", *given])
    assert end.value.code == 2
    assert f"{given[0]}: a whole number of at least" in capsys.readouterr().err
