# Examples of several processes: Python's under torchrun and under Accelerate, and the C++ program.
import os
import re
import subprocess
import sys

from cpp_programs import EXAMPLES


def test_two_processes_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, EXAMPLES / "many_processes.py", tmp_path / "saved"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    ranks = re.search(r"2 processes, 140 steps: ranks \{'0': (\d), '2': (\d)\}", result.stdout)
    assert ranks, result.stdout
    assert sum(map(int, ranks.groups())) == 6
    assert float(re.search(r"right: (.*)%", result.stdout)[1]) > 80
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_two_processes_of_the_cpp_program_decide_alike(programs, tmp_path):
    command = [programs / "many_processes", tmp_path / "store"]
    started = [
        subprocess.Popen([*command, str(rank), "2"], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    ranks = [re.fullmatch(r"process \d: 0 (\d) 2 (\d)\n", output).groups() for output in outputs]
    assert ranks[0] == ranks[1] and sum(map(int, ranks[0])) == 6
