"""What every CUDA implementation keeps to, read from its source; needs no GPU and no compiler."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[4] / "csrc" / "ops" / "cuda"
SOURCES = {
    path.name: path.read_text()
    for path in sorted(FOLDER.glob("*.cpp"))
    if re.search(r"kernels::launch_|CudaAdapter adapter\(", path.read_text())
}
# A call runs to the semicolon of its statement.
LAUNCH = re.compile(r"([^;{}]*)kernels::(launch_\w+)\(([^;]*);")


def launches() -> list[tuple[str, str, str, str]]:
    """(file, launcher, what stands before the call, its arguments and what follows)."""
    return [
        (name, found[2], found[1], found[3])
        for name, text in SOURCES.items()
        for found in LAUNCH.finditer(text)
    ]


def functions(text: str) -> dict[str, str]:
    """Bodies of the file's functions by name; they end with a brace in the first column."""
    pattern = r"^[\w:<>*& ]+?\b(\w+)\((?:[^;{}]|\{\})*\) \{\n(.*?)^\}"
    return {m[1]: m[2] for m in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)}


def registered() -> list[tuple[str, str]]:
    return [
        (name, function)
        for name, text in SOURCES.items()
        for function in re.findall(r"m\.impl\(\"\w+\",\s+&rankwise::(?:\w+<rankwise::)?(\w+)", text)
    ]


def test_the_sources_are_found():
    assert len(SOURCES) >= 9 and len(launches()) >= 18 and len(registered()) >= 15


@pytest.mark.parametrize("file, launcher, before, call", launches(), ids=lambda x: x[:24])
def test_launches_are_checked_and_go_to_the_current_stream(file, launcher, before, call):
    assert "check_launch(" in before or "int error =" in before, f"{file}: {launcher}"
    assert re.search(r"\b(current_stream|stream|getCurrentCUDAStream)\(\)", call), (
        f"{file}: {launcher} is given another stream"
    )


@pytest.mark.parametrize("file, function", registered(), ids=str)
def test_implementations_guard_the_device_and_fall_back(file, function):
    """On a device this build has no kernels for, the composite form takes the call."""
    body = functions(SOURCES[file])[function]
    assert "const c10::cuda::CUDAGuard guard(" in body
    assert re.search(r"has_kernels\(|kernels_serve\(", body), f"{file}: {function} has no fall-back"
    assert "composite" in body
