# Small problems that together launch every kernel of csrc/kernels: what compute-sanitizer checks.
"""python small_problems.py runs them on the GPU; with --after NAME those behind that one alone.

Each problem says which kernels it launches. Sizes are odd in one half of the layers, so that rows
begin anywhere, and multiples of eight in the other, so that they are read 16 bytes at a time. An
error of the device ends the process, for its context is lost; all others are printed.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("RANKWISE_TERM_PRODUCT", "on")  # read when the first layer runs

import torch
from torch import Tensor

import rankwise as rw

FORWARD = {"row_products", "finish", "expand"}
BACKWARD = {"column_products"}
DTYPES = {  # name: (base, factors)
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16_float32": (torch.bfloat16, torch.float32),
    "float16_float32": (torch.float16, torch.float32),
}
ALLOCATED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ODD, ALIGNED, WIDE = (299, 131, 83), (299, 136, 88), (6599, 1032, 1032)  # tokens, in, out
BESIDE = (2040, 4088, 4088)  # x is read beside the products
ops = torch.ops.rankwise


@dataclass(frozen=True)
class Problem:
    """run(device) returns its results; `path` is what must serve WIDE layers for the kernels."""

    run: Callable[[str], object]
    kernels: frozenset[str]
    path: str = ""


def adapter(device: str, name: str, sizes: tuple[int, int, int], rank: int, gate: bool) -> list:
    """x, W, bias, A, B and E of a layer; its base takes no gradients."""
    tokens, n_in, n_out = sizes
    base, factor = DTYPES[name]
    shapes = [(tokens, n_in), (n_out, n_in), (n_out,), (rank, n_in), (n_out, rank), (rank, 1)]
    drawn = [torch.randn(shape, device=device).mul_(0.1) for shape in shapes]
    cast = [t.to(base if i < 3 else factor) for i, t in enumerate(drawn)]
    for i in (0, 3, 4, 5):
        cast[i].requires_grad_()
    return cast if gate else [*cast[:5], None]


def with_gradients(y: Tensor | list[Tensor], leaves: list[Tensor | None]) -> list[Tensor]:
    """y and the gradients of the leaves that are there."""
    outputs = [y] if isinstance(y, Tensor) else y
    leaves = [t for t in leaves if t is not None]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]


def linear(
    name: str, sizes: tuple, rank: int, gate: bool, wanted: str, device: str, dropout: float = 0.3
) -> object:
    """`wanted` are the letters of what takes gradients; a gate comes with dropout and a bias."""
    x, W, bias, A, B, E = adapter(device, name, sizes, rank, gate)
    leaves = {"x": x, "A": A, "B": B, "E": E}
    for letter, leaf in leaves.items():
        if leaf is not None and letter not in wanted:
            leaf.requires_grad_(False)
    p = dropout if gate else 0.0
    y = rw.ops.lora_linear(x, W, bias if gate else None, A, B, E, scaling=0.5, dropout_p=p)
    return with_gradients(y, [leaves[letter] for letter in wanted])


def update(name: str, device: str) -> object:
    x, W, _, A, B, E = adapter(device, name, ODD, 5, gate=True)
    base = x.detach() @ W.t()
    y = rw.ops.lora_update(base, x, A, B, E, scaling=0.5, dropout_p=0.3)
    return with_gradients(y, [x, A, B, E])


def group(name: str, sizes: tuple[int, int, int], rank: int, device: str) -> object:
    """Above 256 directions together x is read for each layer."""
    layers = [adapter(device, name, sizes, rank, gate=True) for _ in range(3)]
    x = layers[0][0]
    _, W, bias, A, B, E = (list(parts) for parts in zip(*layers, strict=True))
    y = rw.ops.lora_linear_group(x, W, bias, A, B, E, scaling=[0.5] * 3, dropout_p=0.3)
    return with_gradients(y, [x, *A, *B, *E])


def embedding(name: str, indices: torch.dtype, device: str) -> object:
    """Some rows are taken often: sums of two levels."""
    _, table, _, A, B, E = adapter(device, name, (1, 45, 61), 5, gate=True)
    A, B = (torch.randn_like(t.t()).requires_grad_() for t in (B, A))
    taken = torch.randint(7, (299,), device=device, dtype=indices)
    y = rw.ops.lora_embedding(taken, table, A, B, E, scaling=0.5, padding_idx=3)
    return with_gradients(y, [A, B, E])


def mask(dtype: torch.dtype, device: str) -> Tensor:
    return rw.ops.dropout_mask(torch.tensor([7], device=device), 13, 11, 0.3, dtype)


RANKS = (5, 0, 13)  # of three adapters; the last two shapes below have several blocks


def progress(device: str, budget: int) -> Tensor:
    return torch.tensor([3, 0, budget, 1, 0, 0], device=device)


def importance(dtype: torch.dtype, device: str) -> object:
    shapes = zip((7, 9, 4101), (3, 5, 70), RANKS, strict=True)
    sizes = [size for i, o, r in shapes for size in ((r, i), (o, r), (r, 1))]
    average = torch.float64 if dtype == torch.float64 else torch.float32
    parameters, gradients = (
        [torch.randn(s, device=device).to(dtype) for s in sizes] for _ in range(2)
    )
    sums = [[torch.rand(s, device=device, dtype=average) for s in sizes] for _ in range(2)]
    found = ops._importance_check(gradients)
    now = progress(device, 9)
    return found, ops._importance_step_(parameters, gradients, *sums, RANKS, 0.8, 0.9, True, now)


def choice(dtype: torch.dtype, device: str) -> object:
    """A step of the schedule, the choice in it, its masks and its row of the history."""
    before, budgets = progress(device, 9), torch.tensor([-1, 9, 9, 9, 40], device=device)
    found_inf = torch.zeros((), device=device, dtype=dtype)
    now = ops._schedule_step(before, torch.tensor([False, True], device=device), found_inf,
                             budgets, 8)  # fmt: skip
    scores = torch.rand(sum(RANKS), device=device, dtype=torch.float64)
    kept = torch.zeros(sum(RANKS), device=device, dtype=torch.bool)
    ops._select_triplets_(kept, scores, RANKS, [3, 1, 2], 1, now)
    gates = [torch.ones(rank + 1, 1, device=device, dtype=dtype) for rank in RANKS]
    ops._mask_triplets_(gates, RANKS, kept, now)
    choices = torch.zeros(3, 2 + len(RANKS), device=device, dtype=torch.long)
    summaries = torch.zeros(3, 4, device=device, dtype=torch.float64)
    ops._record_choice_(choices, summaries, now, scores, kept, RANKS, 8)
    return now, kept, *gates, choices, summaries


def orthogonality(dtype: torch.dtype, squared: bool, device: str) -> object:
    """Ranks below the capacity, and of more than one tile."""
    A = [torch.randn(r + 2, 67, device=device).to(dtype).requires_grad_() for r in (3, 0, 21)]
    B = [torch.randn(41, r + 2, device=device).to(dtype).requires_grad_() for r in (3, 0, 21)]
    penalty = rw.ops.orthogonality_penalty(A, B, squared=squared, ranks=[3, 0, 21])
    return with_gradients(penalty, [*A, *B])


def linear_kernels(name: str, rank: int) -> set[str]:
    """With all gradients: dy is read once where so many directions fit."""
    base, factor = DTYPES[name]
    once = base is not torch.float32 and rank <= (32 if base is factor else 16)
    return FORWARD | BACKWARD | ({"output_products"} if once else set())


def layers() -> Iterator[tuple[str, Problem]]:
    for name, (base, factor) in DTYPES.items():
        for rank in (5, 33, 200):
            for sizes, gate, wanted in ((ODD, True, "xABE"), (ALIGNED, False, "xAB")):
                kernels = frozenset(linear_kernels(name, rank))
                run = partial(linear, name, sizes, rank, gate, wanted)
                yield f"linear {name} r{rank}{' gated' if gate else ''}", Problem(run, kernels)
        for wanted in "AB":  # each reads dy by itself
            run = partial(linear, name, ALIGNED, 5, False, wanted)
            yield f"linear {name} d{wanted} alone", Problem(run, frozenset(FORWARD | BACKWARD))
        kernels = frozenset(linear_kernels(name, 5))
        yield f"update {name}", Problem(partial(update, name), kernels)
        yield f"group {name}", Problem(partial(group, name, ODD, 5), kernels)
        of_each = frozenset(linear_kernels(name, 100))
        yield f"group {name} r300", Problem(partial(group, name, ODD, 100), of_each)
        indices = torch.int32 if base is factor else torch.int64
        once = {"output_products"} if "output_products" in kernels else {"row_products", *BACKWARD}
        of_table = {"gather", "expand", "finish"} | once
        run = partial(embedding, name, indices)
        yield f"embedding {name}", Problem(run, frozenset(of_table | {"column_sums"}))
        if base is torch.bfloat16 or base is factor is torch.float16:
            for gate, wanted in ((True, "xABE"), (False, "xAB")):
                joined = linear_kernels(name, 5) - {"expand"} | {"linear_product"}
                run = partial(linear, name, WIDE, 5, gate, wanted)
                title = f"joined {name}{' gated' if gate else ''}"
                yield title, Problem(run, frozenset(joined), path="cuda (sm_90a)")
            split = {"split_term"} if base is not factor else set()
            run = partial(group, name, WIDE, 5)
            yield f"joined group {name}", Problem(run, frozenset(joined | split), "cuda (sm_90a)")
    for name in ("bfloat16", "bfloat16_float32"):
        cut = {"cut_factor"} if name == "bfloat16_float32" else set()
        alone = frozenset({"linear_product", "output_products", "finish"} | cut)
        for wanted in ("xABE", "xAB"):
            run = partial(linear, name, BESIDE, 5, "E" in wanted, wanted, dropout=0.0)
            title = f"beside {name}{' gated' if 'E' in wanted else ''}"
            yield title, Problem(run, alone, path="cuda (sm_90a)")


def passes() -> Iterator[tuple[str, Problem]]:
    for dtype in ALLOCATED:
        name = str(dtype).removeprefix("torch.")
        kernels = frozenset({"check_gradients", "importance_step", "importance_scores"})
        yield f"importance {name}", Problem(partial(importance, dtype), kernels)
        chosen = {"schedule_step", "order_triplets", "spend_budget", "mask_triplets"}
        yield (
            f"choice {name}",
            Problem(partial(choice, dtype), frozenset(chosen | {"record_choice"})),
        )
        yield f"mask {name}", Problem(partial(mask, dtype), frozenset({"dropout_mask_kernel"}))
        for squared in (True, False):
            forms = {"gram_deviation", "orthogonality_terms", "sum_of_terms"}
            run = partial(orthogonality, dtype, squared)
            title = f"orthogonality {name} {'squared' if squared else 'norms'}"
            yield title, Problem(run, frozenset(forms | {"orthogonality_gradient"}))


PROBLEMS: dict[str, Problem] = dict([*layers(), *passes()])


def serves(problem: Problem, device: str = "cuda") -> bool:
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    return not problem.path or rw.ops.path(like, (*WIDE, 5)) == problem.path


def main(after: str | None, device: str = "cuda") -> int:
    """Says which problem begins and ends, so that a reader of the log knows whose an error is."""
    failed, names = 0, list(PROBLEMS)
    for name in names[names.index(after) + 1 :] if after else names:
        if not serves(PROBLEMS[name], device):
            print(f"left out {name}: it needs {PROBLEMS[name].path}", flush=True)
            continue
        print(f"begin {name}", flush=True)
        try:
            PROBLEMS[name].run(device)
            if device == "cuda":
                torch.cuda.synchronize()
        except torch.AcceleratorError:
            traceback.print_exc()
            os._exit(1)  # what would still be freed meets the same error
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            failed = 1
        print(f"end {name}", flush=True)
    print("all problems have begun", flush=True)
    return failed


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--after", choices=PROBLEMS, metavar="NAME")
    sys.exit(main(parser.parse_args().after))
