# The C++ programs over the digits: an AdaLoRA training that Python loads, and a task switch.
import os
import pty
import re
import subprocess
import sys

import peft
import pytest
import torch
from cpp_programs import EXAMPLES, output_of
from torch import nn

import rankwise as rw

LINEAR = ["embed", "query", "key", "value", "output", "up", "down", "head"]


class Classifier(nn.Module):
    """digits.h's, in Python."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.empty(8, 64))
        sizes = [(8, 64), (64, 64), (64, 64), (64, 64), (64, 64), (64, 128), (128, 64), (64, 10)]
        for name, size in zip(LINEAR, sizes, strict=True):
            setattr(self, name, nn.Linear(*size))
        self.before_attention, self.before_mlp, self.before_head = (
            nn.LayerNorm(64) for _ in range(3)
        )

    def attention(self, x):
        parts = [getattr(self, name)(x) for name in ("query", "key", "value")]
        heads = [part.unflatten(-1, (4, 16)).transpose(1, 2) for part in parts]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def forward(self, pixels):
        x = self.embed(pixels) + self.position
        x = x + self.attention(self.before_attention(x))
        x = x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))
        return self.head(self.before_head(x).mean(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "digits.pt"
    subprocess.run([sys.executable, EXAMPLES / "cpp" / "export_digits.py", path], check=True)
    return path


@pytest.fixture(scope="module")
def trained(programs, data, tmp_path_factory):
    """What digits_adalora printed, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    return output_of(programs / "digits_adalora", data, folder), folder


def tensors_of(path):
    """What digits.h's write() wrote."""
    return dict(torch.load(path, weights_only=True))


def base_of(folder):
    model = Classifier()
    model.load_state_dict(tensors_of(folder / "base.pt"))
    return model.eval()


def test_the_data(data):
    tensors = torch.load(data, weights_only=True)
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert sizes == {
        "train_pixels": (1437, 8, 8),
        "test_pixels": (360, 8, 8),
        "train_labels": (1437,),
        "test_labels": (360,),
    }
    for part in ("train", "test"):
        pixels, labels = tensors[f"{part}_pixels"], tensors[f"{part}_labels"]
        assert pixels.min() == 0 and pixels.max() == 1
        assert labels.unique().tolist() == list(range(10))


def test_python_and_peft_load_what_cpp_trained(trained, data):
    printed, folder = trained
    tensors = torch.load(data, weights_only=True)
    pixels, labels = tensors["test_pixels"], tensors["test_labels"]
    wanted = tensors_of(folder / "logits.pt")["logits"]
    theirs = peft.PeftModel.from_pretrained(base_of(folder), folder / "adapter").eval()
    ours = base_of(folder)
    assert rw.load_adapter(ours, folder / "adapter") == rw.LoadReport()
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs(pixels), wanted, rtol=1e-6, atol=1e-5)
        assert (base_of(folder)(pixels) - wanted).abs().max() > 1
    new = labels >= 5
    right = 100 * (wanted.argmax(1) == labels)[new].double().mean().item()
    assert f"adapted: {right:.1f} % of 5 .. 9 right" in printed.splitlines()
    assert right > 90
    ranks = {layer.name: layer.rank for layer in rw.summary(ours).layers}
    assert set(ranks) == set(LINEAR) and sum(ranks.values()) == 4 * 8
    for name, rank in ranks.items():
        assert f"{name}: rank {rank} of 8" in printed.splitlines()


def test_the_base_is_what_it_was(trained, data):
    printed, folder = trained
    tensors = torch.load(data, weights_only=True)
    old = tensors["test_labels"] < 5
    with torch.no_grad():
        logits = base_of(folder)(tensors["test_pixels"])
    right = 100 * (logits.argmax(1) == tensors["test_labels"])[old].double().mean().item()
    assert right > 95
    assert printed.splitlines()[-1] == (
        f"without the adapter: {right:.1f} % of 0 .. 4 right, every logit as before"
    )


def test_tasks_are_switched_over_one_base(programs, data):
    """Run in a terminal, which is where the progress line is to be seen."""
    shown, terminal = pty.openpty()
    with subprocess.Popen(
        [programs / "task_switch", data], stdout=subprocess.PIPE, stderr=terminal, text=True
    ) as run:
        os.close(terminal)
        progress = b""
        while chunk := read(shown):
            progress += chunk
        printed = run.stdout.read()
    assert run.returncode == 0, printed
    for title, steps in {"training the base": 400, "rotated": 300, "mirrored": 300}.items():
        assert f"\r{title}: step {steps} of {steps}, loss " in progress.decode()
    assert progress.endswith(b"\r\033[K")

    header, *rows, swap, base = printed.splitlines()
    tasks = ["upright", "rotated", "mirrored"]
    assert header.split() == ["adapter", *tasks]
    shares = [[float(share) for share in re.findall(r"[\d.]+(?= %)", row)] for row in rows]
    assert [row.split()[0] for row in rows] == tasks
    for own, row in enumerate(shares):
        assert row[own] == max(row) > 85
        assert all(row[own] > shares[other][own] for other in range(3) if other != own)
    assert re.fullmatch(r"a swap: [\d.]+ us", swap)
    assert base == "base: every bit as before"


def read(terminal: int) -> bytes:
    """The next bytes, none at the end, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_a_missing_file_is_named(programs, data, tmp_path):
    for arguments in (
        ["digits_adalora", tmp_path / "nothing", tmp_path],
        ["task_switch", tmp_path / "nothing"],
        ["similarity", tmp_path / "nothing", data],
        ["similarity", data, tmp_path / "nothing"],
    ):
        run = [programs / arguments[0], *arguments[1:]]
        result = subprocess.run(run, capture_output=True, text=True)
        assert result.returncode == 1
        assert str(tmp_path / "nothing") in result.stderr
