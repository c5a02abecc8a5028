"""``python -m rankwise --cmake-dir``: where CMake finds the C++ package."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rankwise", description=__doc__)
    parser.add_argument(
        "--cmake-dir", action="store_true", required=True, help="print the folder and exit"
    )
    parser.parse_args()
    print(Path(__file__).parent / "share" / "cmake")


if __name__ == "__main__":
    main()
