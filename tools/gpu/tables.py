# What make gpu prints last: sections of rows, cut where they would not fit.
from __future__ import annotations

from collections.abc import Mapping, Sequence

LIMIT = 8000  # characters of all sections
WIDTH = 200  # of a row
Sections = Mapping[str, Sequence[str]]


def table(sections: Sections, limit: int = LIMIT) -> str:
    """Title and rows of each section, at most `limit` characters in all.

    Rows go from the end of the longest section first, and each section says how many it lost.
    """
    shown = {title: [_cut(row) for row in rows] for title, rows in sections.items()}
    lost = dict.fromkeys(shown, 0)
    while len(text := _text(shown, lost)) > limit:
        longest = max(shown, key=lambda title: sum(len(row) + 1 for row in shown[title]))
        if not shown[longest]:
            return text[:limit]
        shown[longest].pop()
        lost[longest] += 1
    return text


def _cut(row: str) -> str:
    return row if len(row) <= WIDTH else f"{row[: WIDTH - 3]}..."


def _text(shown: Sections, lost: Mapping[str, int]) -> str:
    lines = []
    for title, rows in shown.items():
        lines += [f"## {title}", *rows]
        if lost[title]:
            lines.append(f"({lost[title]} more rows in the JSON)")
    return "\n".join(lines)
