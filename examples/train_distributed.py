"""Digits on several processes: ``torchrun --nproc-per-node 2 examples/train_distributed.py``.

Each process trains on its own part of every batch, with Muon's state divided among them. On a machine without a GPU the
processes talk by gloo. ``--quick`` takes a few uncompiled steps.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fusion_compile as fc


def loss_fn(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy under noise that differs by rank, and the accuracy on the batch."""
    scores = model(images + 0.3 * torch.randn_like(images))
    return F.cross_entropy(scores, labels), {"accuracy": (scores.argmax(1) == labels).float().mean()}


def main() -> None:
    """Train, evaluate on rank 0, and save."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--out", default="", help="folder of the checkpoint; empty: none is saved")
    given = arguments.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())

    pixels, kinds = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(kinds)
    images, labels = images.to(device), labels.to(device)
    train, test = slice(0, 1500), slice(1500, None)

    hidden = [layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.SiLU())]
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), *hidden, nn.Linear(128, 10)).to(device)
    torch.manual_seed(1234 + rank)
    mode, steps = ("eager", 10) if given.quick else (None, 400)
    mesh = init_device_mesh(device, (world,))
    rate = fc.optim.cosine(0.02, steps)
    step = fc.compile_training_step(model, loss_fn, optimizer="muon", lr=rate, mesh=mesh, mode=mode)

    shuffled = torch.Generator().manual_seed(0)  # the same on every rank, of which each takes every world-th example
    for _ in range(steps):
        batch = torch.randint(1500, (128,), generator=shuffled)[rank::world]
        step(images[train][batch], labels[train][batch])
    if rank == 0:  # a rank may evaluate alone
        found = step.evaluate(images[test], labels[test])
        print(f"{world} ranks, step {int(step.metrics['step'])}: test accuracy {float(found['accuracy']):.3f}")
    if given.out:
        step.save(given.out)  # all ranks together
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
