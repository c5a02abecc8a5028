"""``rankwise``: the command line, and ``--cmake-dir``, which needs no other package."""

import sys
from pathlib import Path


def main() -> None:
    if sys.argv[1:] == ["--cmake-dir"]:
        print(Path(__file__).parent / "share" / "cmake")
        return
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f"rankwise: commands need {missing}; install it with: pip install typer rich")
    started = Path(sys.argv[0]).stem
    app(prog_name="python -m rankwise" if started == "__main__" else started)


if __name__ == "__main__":
    main()
