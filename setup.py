"""A shim over CMake: everything about the build stands in CMakeLists.txt and pyproject.toml."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def installed_torch() -> str | None:
    """The version of torch where this package is going, also from within pip's build isolation."""
    version_file = Path(sysconfig.get_paths()["purelib"]) / "torch" / "version.py"
    if not version_file.is_file():
        return None
    match = re.search(r"__version__ = '([^'+]+)", version_file.read_text())
    return match.group(1) if match else None


def build_torch() -> str:
    """The version of the torch that this build links against, or "" before there is one."""
    if find_spec("torch") is None:  # a question about metadata alone
        return installed_torch() or ""
    return metadata.version("torch").split("+")[0]


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the Python package."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        torch_folder = find_spec("torch").submodule_search_locations[0]
        where = hashlib.sha256(torch_folder.encode()).hexdigest()[:8]  # pip's isolation moves it
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{build_torch()}-{where}"
        arguments = [
            f"-DCMAKE_INSTALL_PREFIX={package}",
            "-DRANKWISE_WITH_PYTHON=ON",
            "-DRANKWISE_BESIDE_TORCH=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLibTorch_ROOT={torch_folder}",
            f"-DRANKWISE_PYTHON={sys.executable}",
            f"-DRANKWISE_WITH_CUDA={os.environ.get('RANKWISE_WITH_CUDA', 'auto').lower()}",
            f"-DRANKWISE_WARNINGS_AS_ERRORS={os.environ.get('RANKWISE_WARNINGS_AS_ERRORS', 'OFF')}",
        ]
        for name in ("RANKWISE_CUDA_ARCHITECTURES", "RANKWISE_JSON_INCLUDE_DIR"):
            if os.environ.get(name):
                arguments.append(f"-D{name}={os.environ[name]}")
        jobs = os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))
        if shutil.which("ninja"):
            arguments.append("-GNinja")
        self._cmake("-S", str(ROOT), "-B", str(build), *arguments)
        self._cmake("--build", str(build), "-j", jobs)
        self._cmake("--install", str(build))

    @staticmethod
    def _cmake(*arguments: str) -> None:
        subprocess.run(["cmake", *arguments], check=True)


def torch_requirement() -> list[str]:
    """One binary serves one torch minor: the package asks for the one it was built for."""
    version = build_torch()
    if not version:
        return ["torch>=2.11"]
    major, minor = version.split(".")[:2]
    return [f"torch=={major}.{minor}.*"]


torch_here = installed_torch()
setup(
    ext_modules=[Extension("rankwise._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=torch_requirement(),
    # Build isolation starts from an empty environment: ask for the torch the user has.
    setup_requires=[f"torch=={torch_here}" if torch_here else "torch>=2.11"],
)
