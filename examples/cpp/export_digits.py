"""Writes scikit-learn's 1,797 handwritten digits as tensors that torch::pickle_load reads."""

import sys

import torch
from sklearn.datasets import load_digits

TEST = 360


def main(path: str) -> None:
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[TEST:], "test": order[:TEST]}
    tensors = {f"{part}_pixels": pixels[rows] for part, rows in parts.items()}
    tensors |= {f"{part}_labels": labels[rows] for part, rows in parts.items()}
    torch.save(tensors, path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FILE")
    main(sys.argv[1])
