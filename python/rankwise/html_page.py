"""A page of HTML in one file: pictures inline, no script, nothing from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --ink: #262626; --paper: #ffffff; --line: #d9dce1; --soft: #5c636d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16191d; --line: #3a4048; --soft: #a3abb6; }
  svg { filter: brightness(1.25); }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { color: var(--soft); max-width: 44rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr;
  gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 1.5rem; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 34rem; max-width: 50rem; height: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; }
summary { cursor: pointer; padding: .3rem 0; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(title: str, *parts: str) -> str:
    """The whole page; the title is text, the parts are HTML."""
    return PAGE.substitute(title=escape(title), body="\n".join(parts))


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def facts(found: Mapping[str, object]) -> str:
    """Names and values; those that are None are left out."""
    rows = [
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in found.items()
        if value is not None
    ]
    return "\n".join(["<dl>", *rows, "</dl>"])


def picture(figure, caption: str) -> str:
    """A matplotlib Figure as SVG, with text and frames in the page's colour, light or dark."""
    from .plots.look import INK

    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", facecolor="none", metadata=nothing)
    svg = written.getvalue()
    svg = re.sub("<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    label = escape(caption, quote=True)
    return (
        f'<figure>\n<div class="wide" role="img" aria-label="{label}" tabindex="0">\n{svg}</div>\n'
        f"<figcaption>{label}</figcaption>\n</figure>"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], opened: bool) -> str:
    """Under a line that unfolds it."""
    rows = list(rows)
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<details{' open' if opened else ''}>\n<summary>{len(rows)} modules</summary>\n"
        f'<div class="wide" tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>\n</details>"
    )
