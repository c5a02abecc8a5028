# No tensor that torch offers is read at a wrong address: each call gives what a plain tensor gives,
# or an error that names the kind.
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensor_kinds import OF_OTHER_TYPES, WITH_VALUES, WITHOUT_MEMORY

PROGRAM = Path(__file__).with_name("tensor_kinds.py")
# Calls that read or write what is in a place.
READ = {
    "lora_A": {"save", "export", "load", "allocator"},
    "head": {"save", "export", "load"},
    "gradient": {"allocator"},
    "state": {"load_state_dict"},
    "weight": set(),
}
ONLY_ON_A_GPU = {"SparseSemiStructuredTensor", "SparseSemiStructuredTensorCUTLASS"}
ONLY_ON_A_GPU |= {"SparseSemiStructuredTensorCUSPARSELT"}
IN_OTHER_TESTS = {"Parameter", "FlatParameter"}
NEVER_A_CLASS = {"Buffer"}  # nn.Buffer makes plain tensors
# The variants of torch's own tests, which differ from those among the kinds in what they compute.
ALIKE = {"LoggingTensorReentrant", "DiagTensorBelow", "SparseTensor", "SubclassWithTensorFactory"}
ALIKE |= {"ConstantExtraMetadataTensor", "RedispatchTensor"}
NO_OPERANDS = {"ReadOnlyTensorWrapper"}  # which no operation takes


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM], capture_output=True, text=True, timeout=300
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"{lines[-1:]}\n{run.stderr[-3000:]}"
    return lines


@pytest.fixture(scope="module")
def outcomes(lines) -> list[dict]:
    return [line for line in lines if len(line) > 3]


def of(outcomes: list[dict], kinds) -> list[dict]:
    found = [one for one in outcomes if one["kind"] in kinds]
    assert {one["kind"] for one in found if "impossible" not in one} == set(kinds)
    return found


def test_what_has_no_memory_is_refused_by_name_where_it_would_be_read(outcomes):
    for one in of(outcomes, WITHOUT_MEMORY):
        name = one["kind"].removesuffix(" of unknown size")
        if one["call"] in READ[one["place"]] and "impossible" not in one:
            assert name in one.get("error", ""), one
        if "error" in one:
            assert name in one["error"], one
        elif one["call"] == "health_check" and one["place"] == "gradient" and "result" in one:
            assert "ok" in one["result"] or name in one["result"], one


def test_what_has_values_gives_what_a_plain_tensor_gives(outcomes):
    for one in of(outcomes, WITH_VALUES):
        if "result" in one:
            assert one["result"] == one["wanted"], one
        elif "error" in one:
            wanted = ("DTensor", "share memory", "must be contiguous")
            assert any(part in one["error"] for part in wanted), one


def test_what_no_layer_computes_with_is_an_error_or_left_alone(outcomes):
    for one in of(outcomes, OF_OTHER_TYPES):
        if one["call"] in READ[one["place"]] - {"load"} and one["place"] != "gradient":
            assert "error" in one, one


def test_every_subclass_of_torch_is_among_the_kinds(lines):
    """Of the modules that the program imports, which are those where torch has any."""
    told = ONLY_ON_A_GPU | IN_OTHER_TESTS | NEVER_A_CLASS | ALIKE | NO_OPERANDS
    assert set(lines[-1]["left_out"]) - told == set()
