# The device tests share the helpers of the other suites.
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / name) for name in ("ops", "allocation")]
