"""What the compiler made of the device kernels: registers, spills, shared memory, architectures.

Read from the built library with cuobjdump, of the CUDA toolkit or of triton. The plan is one table;
shared memory that launches ask for is bounded where the kernels are written.
"""

import re
import shutil
import subprocess
from collections import Counter
from importlib import util
from pathlib import Path

import pytest

import rankwise
from rankwise._library import library

ARCHITECTURES = {"sm_80", "sm_90"}  # RANKWISE_CUDA_ARCHITECTURES
# kernel -> the one architecture it is for.
ALONE = dict.fromkeys(("cut_factor", "linear_product", "split_term"), "sm_90a")

# kernel -> (instances, most registers of a thread, most bytes of static shared memory). Registers:
# 128 let two blocks of 256 threads run on one multiprocessor.
PLAN = {
    "check_gradients": (1, 48, 0),
    "column_products": (10, 128, 0),
    "column_sums": (5, 64, 0),
    "cut_factor": (1, 32, 0),
    "dropout_mask_kernel": (4, 32, 0),
    "expand": (50, 128, 0),
    "finish": (3, 48, 5120),
    "gather": (3, 32, 0),
    "gram_deviation": (4, 128, 17408),
    "importance_scores": (1, 48, 0),
    "importance_step": (1, 48, 2048),
    "linear_product": (12, 168, 16),  # 384 threads, which share out 64 Ki registers as they run
    "mask_triplets": (1, 32, 0),
    "order_triplets": (1, 48, 4096),
    "orthogonality_gradient": (4, 64, 10752),
    "orthogonality_terms": (2, 40, 2048),
    "output_products": (6, 128, 0),
    "probe_kernel": (1, 32, 0),
    "record_choice": (1, 64, 8832),
    "row_products": (20, 128, 0),
    "schedule_step": (1, 32, 0),
    "spend_budget": (1, 40, 4616),
    "split_term": (1, 32, 0),
    "sum_of_terms": (2, 40, 2048),
}

# kernel -> most bytes of a thread's registers that lie in memory: of float32 factors with more than
# 16 directions, and of sums on a table's rows. Fewer warps at a time would cost more.
SPILLED = {"column_products": 56, "expand": 112, "row_products": 32}


def cuobjdump() -> str | None:
    """The program of the toolkit on the path or in its usual place, else triton's."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    triton = util.find_spec("triton")
    if found or triton is None:
        return found
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(program) if program.exists() else None


def kernel_name(symbol: str) -> str:
    """The last name of a mangled one, before its template arguments."""
    found = [name for name in PLAN if re.search(rf"\d{name}(I|E)", symbol)]
    assert len(found) == 1, f"a kernel outside the plan: {symbol}"
    return found[0]


def dump(*options: str) -> list[str]:
    """Lines of what cuobjdump says of the built library."""
    if not library.cuda:
        pytest.skip("rankwise was built without its CUDA side: there are no kernels to look at")
    program = cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump: neither a CUDA toolkit nor triton is installed")
    path = Path(rankwise.__file__).parent / "lib" / "librankwise.so"
    run = subprocess.run([program, *options, path], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def usage() -> list[dict]:
    """One entry for each kernel and architecture."""
    entries, architecture = [], ""
    for line in dump("--dump-resource-usage"):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
            entries.append(
                {"name": kernel_name(symbol), "symbol": symbol, "architecture": architecture}
            )
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            numbers = map(int, match.groups())
            entries[-1].update(zip(("registers", "stack", "shared", "local"), numbers, strict=True))
    return entries


def test_every_kernel_is_there_for_every_architecture(usage):
    counts = Counter((entry["name"], entry["architecture"]) for entry in usage)
    assert counts == {
        (name, architecture): plan[0]
        for name, plan in PLAN.items()
        for architecture in ([ALONE[name]] if name in ALONE else ARCHITECTURES)
    }


def test_little_spills(usage):
    beyond = [e for e in usage if e["stack"] > SPILLED.get(e["name"], 0) or e["local"]]
    assert beyond == []


def test_registers_and_shared_memory_keep_to_the_plan(usage):
    beyond = []
    for entry in usage:
        _, registers, shared = PLAN[entry["name"]]
        # sm_90 keeps 1 KiB of a block's shared memory, where it has any, for itself.
        own = max(
            0, entry["shared"] - (1024 if entry["architecture"] in ("sm_90", "sm_90a") else 0)
        )
        if entry["registers"] > registers or own > shared:
            beyond.append(entry)
    assert beyond == []


def test_the_product_of_sm_90a_runs_on_its_own_instructions(usage):
    """Of each instance: a tile's products (4 in a block, 4, 3, 2 or 1 in the last) and the 8 of a
    pass beside it, the copy engine's loads and stores, and nothing in local memory."""
    symbols = [entry["symbol"] for entry in usage if entry["name"] == "linear_product"]
    names = ("HGMMA", "UTMALDG", "UTMASTG", "LDL", "STL")
    found, count = [], Counter()
    for line in dump("-sass", "-fun", ",".join(symbols)):
        if re.match(r"\s*Function :", line):
            found.append(count := Counter())
        elif match := re.match(r"\s*/\*\w+\*/\s+(?:@!?\w+ )?(\w+)", line):
            count[match[1]] += match[1] in names
    tile, beside = 4 + 4 + 3 + 2 + 1, 8
    assert Counter((count["HGMMA"], count["UTMALDG"]) for count in found) == {
        (tile, 2): 2, (tile, 5): 4, (tile + beside, 2 + 4): 3, (tile + beside, 5 + 3): 3,
    }, found  # fmt: skip
    for count in found:
        assert count["UTMASTG"] == 4, found
        assert count["LDL"] == count["STL"] == 0, found
