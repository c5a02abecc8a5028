# Lets tests import the examples' modules, which find each other beside the script that is run, and
# builds the C++ programs once.
import sys

import pytest
from cpp_programs import EXAMPLES, build

sys.path[:0] = [str(EXAMPLES / folder) for folder in ("sentiment", "smollm2", "study", "cpp")]


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """examples/cpp, built outside the tree against the installed package."""
    return build(EXAMPLES / "cpp", tmp_path_factory.mktemp("cpp"))
