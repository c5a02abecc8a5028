# What rankwise needs by itself, and what it says when a library that it has a face to is missing.
import subprocess
import sys

PROGRAM = """
import sys
sys.modules["transformers"] = sys.modules["peft"] = None  # as if they were not installed
import rankwise
try:
    import rankwise.integrations.transformers
except ModuleNotFoundError as error:
    print(error)
"""


def test_transformers_is_needed_by_its_face_alone():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    wanted = "rankwise.integrations.transformers needs transformers: pip install transformers"
    assert run.stdout.strip() == wanted


def test_importing_rankwise_imports_none_of_them():
    program = (
        "import rankwise, sys; print({'transformers', 'peft', 'accelerate'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
