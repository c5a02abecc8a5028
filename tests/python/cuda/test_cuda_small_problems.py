# The problems that compute-sanitizer checks launch the kernels that they name, and no others.
import re

import pytest
from cuda_device import DEVICE
from small_problems import PROBLEMS, serves
from test_cuda_paths import launched

# The first name: template arguments follow it.
KERNEL = re.compile(r"rankwise::kernels::[^:]+::(\w+)")


@pytest.mark.parametrize("name", PROBLEMS)
def test_which_kernels_run(name):
    problem = PROBLEMS[name]
    if not serves(problem):
        pytest.skip(f"this device does not take {problem.path}")
    problem.run(DEVICE)
    found = [KERNEL.search(kernel) for kernel in launched(lambda: problem.run(DEVICE))]
    assert {match[1] for match in found if match} == problem.kernels
