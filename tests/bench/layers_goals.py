# What the times of layers.py are judged by: the FLOP floor, the frozen layer, and PEFT.
from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from statistics import geometric_mean

from rich.table import Table

from .contenders import Case

# (dtype, with dropout) -> geometric mean of the speed-ups over PEFT that is wanted
SPEED_UPS = {
    ("float32", False): 1.45,
    ("float32", True): 1.75,
    ("bfloat16", False): 1.25,
    ("bfloat16", True): 1.9,
}
# the same -> the time over the frozen layer's that is wanted for inputs of (384, at least 768)
RATIOS = {
    ("float32", False): (1.05, 0.92),
    ("float32", True): (1.12, 0.97),
    ("bfloat16", False): (1.25, 1.08),
    ("bfloat16", True): (1.25, 1.15),
}


def kind(case: Case) -> tuple[str, bool]:
    return case.dtype, case.dropout > 0


def flop_floor(case: Case) -> float:
    """FLOPs of the layer over the frozen layer's, both with dx."""
    return 1 + 1.5 * case.rank * (case.n_in + case.n_out) / (case.n_in * case.n_out)


def wanted_ratio(case: Case) -> float | None:
    narrow, wide = RATIOS[kind(case)]
    if case.n_in == 384:
        return narrow
    return wide if case.n_in >= 768 and case.tokens >= 512 and case.rank <= 16 else None


def overview(results: list[dict], contenders: Iterable[str]) -> Table:
    """Ratios to frozen of forward and backward, a row for each case."""
    names = [n for n in contenders if n != "frozen" and any(n in r["both"] for r in results)]
    result = Table(
        title="Time over frozen, forward and backward: median, half the quartiles' distance",
        title_justify="left",
    )
    for column in ("case", *names):
        result.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        cells = [_ratio(row["both"][n]) if n in row["both"] else "" for n in names]
        result.add_row(str(Case(**row["case"])), *cells)
    return result


def _ratio(row: dict[str, float]) -> str:
    """Median and half the distance of the quartiles."""
    return f"{row['ratio']:.2f} ±{(row['ratio_high'] - row['ratio_low']) / 2:.2f}"


def floor(row: dict) -> float:
    """The layer's FLOPs at the speed of the faster frozen layer, over the frozen layer's time."""
    return flop_floor(Case(**row["case"])) * min(1.0, row["both"]["frozen, packed"]["ratio"])


def floor_table(results: list[dict]) -> Table:
    """How far each case is from its FLOPs at the speed of the base, and from what is wanted."""
    title = (
        "rankwise, over frozen and over the floor: its FLOPs at the speed of frozen, of the faster"
    )
    result = Table(title=title, title_justify="left")
    result.add_column("case", no_wrap=True)
    columns = ("over frozen", "wanted", "FLOPs", "over floor", "packed / frozen")
    for column in (*columns, "over floor of the faster"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in results:
        case, both = Case(**row["case"]), row["both"]
        own, packed = both["rankwise"]["ratio"], both["frozen, packed"]["ratio"]
        flops, wanted = flop_floor(case), wanted_ratio(case)
        color = "white" if wanted is None else "green" if own <= wanted else "red"
        result.add_row(
            str(case),
            f"[{color}]{own:.3f}[/{color}]",
            f"{wanted:.2f}" if wanted else "",
            f"{flops:.3f}",
            f"{own / flops:.3f}",
            f"{packed:.3f}",
            f"{own / floor(row):.3f}",
        )
    return result


def speed_table(results: list[dict]) -> Table:
    """Speed-up over eager PEFT: geometric means over all shapes, also at floor(), the worst shape.

    What is wanted beyond the mean at the floor is out of reach on the processor at hand.
    """
    result = Table(title="rankwise over PEFT, forward and backward", title_justify="left")
    for column in ("dtype", "dropout", "geometric mean", "wanted", "at the floor", "worst", "of"):
        result.add_column(column)
    for (dtype, dropout), group in groupby(results, lambda row: kind(Case(**row["case"]))):
        rows = list(group)
        found = {str(Case(**row["case"])): row["speed-up over PEFT"] for row in rows}
        mean, wanted = geometric_mean(found.values()), SPEED_UPS[dtype, dropout]
        best = geometric_mean(row["both"]["PEFT"]["ratio"] / floor(row) for row in rows)
        worst = min(found, key=found.__getitem__)
        colors = ("green" if mean >= wanted else "red", "green" if found[worst] >= 1 else "red")
        result.add_row(
            dtype,
            "yes" if dropout else "no",
            f"[{colors[0]}]{mean:.3f}x[/{colors[0]}]",
            f"{wanted:.2f}x",
            f"{best:.3f}x",
            f"[{colors[1]}]{found[worst]:.3f}x[/{colors[1]}]",
            worst,
        )
    return result
