# The entry of all measurements: python -m bench NAME [options], in the folder tests.
"""Measures what the library costs; python -m bench NAME --help tells of one measurement."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from . import MEASUREMENTS


def main(given: Sequence[str]) -> None:
    name = entry().parse_args(given[:1]).name
    module = import_module(f".{name}", __package__)
    options = module.MEASUREMENT.options(name, module.__doc__, given[1:])
    options.output.mkdir(parents=True, exist_ok=True)
    results = module.MEASUREMENT(options)
    report = {"measurement": name, "options": vars(options), "results": results}
    write_json(options.json or options.output / f"{name}.json", report)
    told = results if isinstance(results, dict) else {}
    for what in told.get("unfinished", ()):
        print(f"no time was left for {what}")
    if told.get("failed"):
        sys.exit(f"failed: {', '.join(told['failed'])}")


def entry() -> ArgumentParser:
    """Of the name alone: a measurement's options are known once it is imported."""
    parser = ArgumentParser(prog="python -m bench", description=__doc__)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, measured in MEASUREMENTS.items():
        names.add_parser(name, help=measured, add_help=False)
    return parser


def write_json(path: Path, report: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=str))
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
