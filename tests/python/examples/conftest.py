# Lets tests import the examples' modules, which find each other beside the script that is run, and
# builds the C++ programs once.
import os
import sys

import pytest
from cpp_programs import EXAMPLES, build
from filelock import FileLock

sys.path[:0] = [str(EXAMPLES / folder) for folder in ("sentiment", "smollm2", "study", "cpp")]


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """examples/cpp, built outside the tree against the installed package, by the first worker."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    with FileLock(folder / "cpp.lock"):
        return build(EXAMPLES / "cpp", folder / "cpp")
