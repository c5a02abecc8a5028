"""The source distribution holds what a build needs; tools/supply.py builds one."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_sources_of_both_languages_are_in_it(tmp_path):
    tree = tmp_path / "tree"  # where no earlier list of files helps
    built = shutil.ignore_patterns("*.egg-info", "*.so", "__pycache__", "lib", "share")
    for folder in ("csrc", "python"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=built)
    for file in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy(file, tree)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = tmp_path.glob("rankwise-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    wanted = [path for path in (tree / "csrc").rglob("*") if path.is_file()]
    wanted += (tree / "python" / "rankwise").rglob("*.py")
    wanted += (tree / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"))
    assert not {path.relative_to(tree) for path in wanted} - held
