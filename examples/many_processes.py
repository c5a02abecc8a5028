"""AdaLoRA in several processes: scikit-learn's digits 5 to 9, for a network trained on 0 to 4.

`torchrun --nproc-per-node 2 examples/many_processes.py build/many_processes`

Each process has batches of its own, DDP averages the gradients, and the allocators compare what
they decide. The first process saves. Also runs alone, without torchrun.
"""

import os
import sys

import torch
import torch.distributed as dist
from sweep_digits import LABELS, NEW, PIXELS, new_model
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import rankwise as rw

EPOCHS, IMAGES_A_STEP = 10, 64


def main(folder: str) -> None:
    several = "RANK" in os.environ  # torchrun's
    if several:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    data = TensorDataset(PIXELS[NEW], LABELS[NEW])
    sampler = DistributedSampler(data, size, rank)  # as many images for each
    batches = DataLoader(data, IMAGES_A_STEP // size, sampler=sampler)
    steps = EPOCHS * len(batches)
    config = rw.AdaLoRAConfig(
        initial_rank=6, target_rank=3, alpha=12.0, target_modules=["0", "2"], modules_to_save=["4"],
        total_steps=steps, warmup_steps=steps // 10, final_steps=steps // 3,
        allocation_interval=5,
    )  # fmt: skip
    torch.manual_seed(0)  # the same factors in all
    model = rw.apply_lora(new_model(), config).to(device)
    allocator = rw.RankAllocator(model, config)  # in the group of all processes
    optimizer = torch.optim.AdamW(rw.parameter_groups(model, lr=1e-2, ratio=1, e_ratio=4))
    allocator.attach(optimizer)
    train(DistributedDataParallel(model) if several else model, allocator, optimizer, batches)

    if rank == 0:
        rw.save_adapter(model, folder)
        with torch.no_grad():
            right = model(PIXELS[NEW].to(device)).argmax(1).cpu() == LABELS[NEW]
        print(f"{size} processes, {steps} steps: ranks {allocator.ranks}")
        print(f"right: {right.double().mean():.1%}")
    if several:
        dist.destroy_process_group()


def train(model: nn.Module, allocator, optimizer, batches: DataLoader) -> None:
    device = next(model.parameters()).device
    for epoch in range(EPOCHS):
        batches.sampler.set_epoch(epoch)
        for pixels, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
            (loss + 0.1 * allocator.orthogonality_penalty()).backward()
            optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "build/many_processes")
