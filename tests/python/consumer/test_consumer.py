"""tests/consumer: a C++ project built on the installed package, on a machine without Python."""

import copy
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch

import rankwise as rw

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = Path(rw.__file__).parent
TORCH = Path(torch.__file__).parent


def program(name: str) -> str:
    """The real program: a pip package's command may be a Python script."""
    spec = find_spec(name)
    candidates = [Path(spec.origin).parent / "data" / "bin" / name] if spec else []
    found = next((path for path in candidates if path.exists()), shutil.which(name))
    assert found, f"{name} is not there"
    return str(found)


@pytest.fixture(scope="module")
def no_python(tmp_path_factory):
    """An environment whose PATH has a compiler, CMake and nothing else."""
    tools = tmp_path_factory.mktemp("bin")
    for name in ["cmake", "ninja", "c++", "as", "ld"]:
        (tools / name).symlink_to(program(name))
    environment = {"PATH": str(tools)}
    assert not any(shutil.which(name, path=str(tools)) for name in ["python", "python3"])
    return environment


def prefix_installation(folder: Path) -> Path:
    """`cmake --install` of the newest build of the library."""
    builds = [
        cache.parent
        for cache in ROOT.glob("build/*/CMakeCache.txt")
        if "CMAKE_PROJECT_NAME:STATIC=rankwise\n" in cache.read_text()
        and (cache.parent / "librankwise.so").exists()
    ]
    newest = max(builds, key=lambda build: (build / "librankwise.so").stat().st_mtime)
    command = [program("cmake"), "--install", newest, "--prefix", folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


class Consumer(NamedTuple):
    build: Path
    environment: dict[str, str]


@pytest.fixture(scope="module", params=["pip", "prefix"])
def consumer(request, tmp_path_factory, no_python):
    """The built project; its link line drops libraries that are not needed."""
    prefix, environment = PACKAGE / "share" / "cmake", dict(no_python)
    if request.param == "prefix":
        prefix = prefix_installation(tmp_path_factory.mktemp("prefix"))
        # Built for the package, the library looks for torch's CUDA parts beside itself.
        environment["LD_LIBRARY_PATH"] = str(TORCH / "lib")
    build = tmp_path_factory.mktemp("consumer")
    configure = ["cmake", "-S", ROOT / "tests" / "consumer", "-B", build, "-G", "Ninja"]
    configure += [f"-DCMAKE_PREFIX_PATH={prefix}", f"-DLibTorch_ROOT={TORCH}"]
    configure += ["-DCMAKE_CXX_COMPILER=c++", "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed"]
    for command in [configure, ["cmake", "--build", build]]:
        result = subprocess.run(command, env=no_python, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    cache = (build / "CMakeCache.txt").read_text()
    assert "LibTorch_PYTHON" not in cache and "Python_EXECUTABLE" not in cache
    return Consumer(build, environment)


class Net(torch.nn.Module):
    """The program's model in Python."""

    def __init__(self, linear, **options):
        super().__init__()
        self.tokens = torch.nn.Embedding(8, 16)
        self.up, self.down = linear(16, 24, **options), linear(24, 4, **options)

    def forward(self, ids):
        return self.down(self.up(self.tokens(ids)).tanh())


PROGRAM_SCHEDULE = rw.AdaLoRAConfig(
    initial_rank=6,
    target_rank=3,
    alpha=12.0,
    total_steps=100,
    warmup_steps=10,
    final_steps=20,
    allocation_interval=5,
    target_modules=["down", "up"],
)


def program_base() -> Net:
    """The base weights that the program drew: both languages draw the same from one seed."""
    torch.manual_seed(0)
    seeded = Net(rw.nn.AdaLoRALinear, rank=6, alpha=12.0)
    base = Net(torch.nn.Linear)
    base.load_state_dict({key: seeded.state_dict()[key] for key in base.state_dict()})
    return base


def test_python_and_peft_load_what_the_program_trained(consumer, tmp_path):
    run = subprocess.run(
        [consumer.build / "train", tmp_path],
        env=consumer.environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    ranks = {name: int(rank) for name, rank in (line.split() for line in lines[:2])}
    assert list(ranks) == ["up", "down"] and sum(ranks.values()) == 6
    wanted = torch.tensor([float(line) for line in lines[2:]]).view(8, 4)

    base, ids = program_base(), torch.arange(8)
    before = base(ids)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert rw.load_adapter(base, tmp_path) == rw.LoadReport()
    assert {name: getattr(base, name).rank for name in ranks} == ranks
    torch.testing.assert_close(base(ids), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs(ids), wanted, rtol=0, atol=1e-6)
    assert (before - wanted).abs().max() > 0.1
    assert rw.adalora_config(base) == PROGRAM_SCHEDULE
    rw.save_adapter(base, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_operators_are_there_without_a_symbol_being_used(consumer):
    run = subprocess.run(
        [consumer.build / "registered"], env=consumer.environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "rankwise::lora_linear is registered\n")


def test_programs_need_no_python(consumer):
    for name in ["train", "registered"]:
        environment = os.environ | consumer.environment | {"PATH": os.environ["PATH"]}
        needed = subprocess.run(
            ["ldd", consumer.build / name], env=environment, capture_output=True, text=True
        ).stdout
        assert "librankwise.so => /" in needed
        assert "libpython" not in needed and "not found" not in needed


def test_the_library_resolves_with_libtorch_alone():
    library = PACKAGE / "lib" / "librankwise.so"
    environment = os.environ | {"LD_LIBRARY_PATH": str(TORCH / "lib")}
    run = subprocess.run(["ldd", "-r", library], capture_output=True, text=True, env=environment)
    output = run.stdout + run.stderr
    assert run.returncode == 0 and "libtorch_cpu.so => /" in output
    assert not [text for text in ("undefined", "not found", "libpython") if text in output], output
