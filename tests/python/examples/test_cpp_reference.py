"""The C++ API reference: every example compiles and runs as it stands."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import rankwise as rw

ROOT = Path(__file__).resolve().parents[3]
HEADERS = ROOT / "csrc" / "include"
PAGE = (ROOT / "docs" / "cpp.md").read_text().partition("\n## Programs\n")[0]
EXAMPLES = re.findall(r"```cpp\n(.*?)```", PAGE, flags=re.DOTALL)

PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(reference LANGUAGES CXX)
find_package(rankwise REQUIRED)
add_executable(reference reference.cpp)
target_link_libraries(reference PRIVATE rankwise::rankwise)
"""
START = """
#include <rankwise/rankwise.h>
#include <torch/torch.h>
namespace {
"""
MAIN = """
}  // namespace
int main(int, char** argv) {
  torch::manual_seed(0);
  const std::string directory = argv[2];
  EXAMPLES[std::atoi(argv[1])](directory);
}
"""


def source() -> str:
    """One program: a function for each example, and a table of them."""
    functions = [
        f"void example_{i}([[maybe_unused]] const std::string& directory) {{\n{code}}}\n"
        for i, code in enumerate(EXAMPLES)
    ]
    names = ", ".join(f"example_{i}" for i in range(len(EXAMPLES)))
    table = f"void (*const EXAMPLES[])(const std::string&) = {{{names}}};\n"
    return START + "".join(functions) + table + MAIN


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "CMakeLists.txt").write_text(PROJECT)
    (folder / "reference.cpp").write_text(source())
    prefix = Path(rw.__file__).parent / "share" / "cmake"
    configure = ["cmake", "-S", folder, "-B", folder / "build", "-G", "Ninja"]
    configure += [f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-O0 -Wall -Wextra -Werror"]
    configure += [f"-DLibTorch_ROOT={Path(torch.__file__).parent}"]
    for command in [configure, ["cmake", "--build", folder / "build"]]:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "build" / "reference"


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_example(program, example, tmp_path):
    run = subprocess.run([program, str(example), tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, EXAMPLES[example] + run.stderr


def declared(pattern: str) -> set[str]:
    """The names of what the public headers declare, as far as the page is to have it."""
    headers = sorted((HEADERS / "rankwise").glob("*.h"))
    text = "\n".join(re.sub(r"//.*", "", header.read_text()) for header in headers)
    names = set(re.findall(pattern, text, flags=re.MULTILINE)) - INNER
    assert len(names) > 10
    return names


def missing(names: set[str], text: str) -> list[str]:
    return [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)]


def test_every_public_class_is_in_an_example():
    classes = declared(r"^(?:class|struct|enum class) (\w+)[^;]*\{")
    assert missing(classes, "".join(EXAMPLES)) == []


def test_every_public_function_is_on_the_page():
    functions = declared(r"^\w[\w:<>,& ]* (\w+)\((?!.*operator)")
    assert missing(functions, PAGE) == []


# Parts of what is on the page: bases, single settings and what only custom optimizers need.
INNER = {
    "Adapted",
    "AdaptedModule",
    "AdaptedLinear",
    "AdapterArguments",
    "AdapterSettings",
    "Allocation",
    "Allocator",
    "BudgetUnit",
    "LoRAInit",
    "LoRALinearImpl",
    "AdaLoRALinearImpl",
    "LoRAEmbeddingImpl",
    "Moments",
    "OptimizerView",
    "OrthogonalityForm",
    "moments_in",
    "to_string",
}
