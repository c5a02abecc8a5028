# Lets tests import the examples' modules, which find each other beside the script that is run.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "sentiment"))
