"""make gpu's build: which carried one is taken, and what becomes of another."""

import json
import os
import sys
from dataclasses import asdict

import pytest
from gpu import build


@pytest.fixture
def carried(tmp_path):
    """A folder with the build that is wanted, and what is wanted."""
    want = build.wanted("90")
    site = tmp_path / "site"
    (site / "rankwise").mkdir(parents=True)
    (site / "rankwise" / f"_C{want.python}").touch()
    (site / "build.json").write_text(json.dumps(asdict(want)))
    return site, want


def test_a_carried_build_that_fits_is_taken(carried, runner, stages, monkeypatch):
    site, want = carried
    assert build.refusals(site, want) == []
    monkeypatch.setattr(build, "loaded", lambda stages, env: {"usable": True})
    report = build.build(stages, 60, "90", site)
    assert report["usable"] and runner.commands == []
    assert build.rows(report) == ["the carried build"]


@pytest.mark.parametrize("name", ["version", "torch", "python", "architecture", "sources"])
def test_a_carried_build_of_another_is_refused_by_name(name, carried):
    site, want = carried
    stamp = asdict(want)
    (site / "build.json").write_text(json.dumps(stamp | {name: "another"}))
    assert build.refusals(site, want) == [f"its {name} is another, wanted {stamp[name]}"]


def test_an_incomplete_build_is_refused(carried):
    site, want = carried
    (site / "rankwise" / f"_C{want.python}").unlink()
    assert build.refusals(site, want) == [f"it has no rankwise/_C{want.python}"]
    (site / "build.json").write_text("{")
    assert build.refusals(site, want) == ["build.json is no JSON"]


def test_what_is_refused_is_built_and_stamped(carried, runner, stages, monkeypatch):
    site, want = carried
    (site / "build.json").unlink()
    monkeypatch.setattr(build, "loaded", lambda stages, env: {"usable": True})
    seen = {}

    def builds(command, log, limit, env):
        site.mkdir()  # the old one is gone
        seen.update(limit=limit, architectures=env["RANKWISE_CUDA_ARCHITECTURES"])
        return 0

    stages._run = builds
    report = build.build(stages, 60, "90", site)
    assert seen == {"limit": 60, "architectures": "90-real"}
    assert json.loads((site / "build.json").read_text()) == asdict(want)
    assert build.rows(report) == ["not the carried build: there is no build.json in site"]


def test_a_build_that_fails_is_not_usable(carried, runner, stages):
    site, _ = carried
    (site / "build.json").unlink()
    runner.codes["build"] = 1
    assert not build.build(stages, 60, "90", site)["usable"]
    assert not (site / "build.json").exists()


def test_the_package_is_asked_in_a_process_of_its_own(stages, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "OUTPUT", tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    report = build.loaded(stages, environment)
    assert report["loaded"]["version"] == build.wanted("90").version
    assert report["usable"] == report["loaded"]["cuda"]
    (tmp_path / "rankwise.py").write_text("raise ImportError('built for another torch')")
    report = build.loaded(stages, environment | {"PYTHONPATH": str(tmp_path)})
    assert not report["usable"]
    assert stages.done[-1].result == "failed: ImportError: built for another torch"


def test_sources_change_the_fingerprint(tmp_path):
    for name in ("csrc/ops/a.cpp", "python/rankwise/ops.py", "setup.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = build.fingerprint(tmp_path)
    (tmp_path / "python" / "rankwise" / "_C.so").touch()
    (tmp_path / "docs.md").touch()
    assert build.fingerprint(tmp_path) == first
    (tmp_path / "csrc" / "ops" / "a.cpp").write_text("another")
    assert build.fingerprint(tmp_path) != first
