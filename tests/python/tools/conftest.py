# Lets the tests import the package of measurements, tests/bench.
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
