"""Train the demonstration's transformer in fp16 with the loss scale in the program, and without one.

    python examples/digits_in_fp16.py [--steps 300] [--depth 2] [--batch 32] [--weight 12]

The loss is a mean over 2,048 entries, and fp16 holds its gradients. A mean over more has smaller ones: over 256 latents
of 16x64x64 they are 2^-13 of that. ``--weight 12`` multiplies the loss by 2^-12, for every arm alike; Adam and
Newton-Schulz do not mind. Arms: fp32; fp16 autocast (``compute_dtype``) and fp16 weights, each with the scale and
without. For each it prints the loss, the share of gradient entries that are zero, skipped steps, the scale, and how
many of 100 samples a classifier reads as the digit asked for. A CPU multiplies fp16 ten times slower than fp32.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("FUSION_COMPILE_PROGRESS", "0")

import torch
import torch.nn.functional as F
from digits import read_digits, real_digits
from dit import DiT
from rich.console import Console
from rich.table import Table
from side_by_side import euler_loop
from torch import Tensor, nn
from train_and_sample_digits import batches

import fusion_compile as fc

FP16 = torch.float16
ARMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16 autocast": {"compute_dtype": FP16},
    "fp16 autocast, no scale": {"compute_dtype": FP16, "loss_scale": False},
    "fp16 weights": {},
    "fp16 weights, no scale": {"loss_scale": False},
}


class Outcome(NamedTuple):
    """Of one arm. `loss`: mean of the last 50, without the weight. `zeros`: share of a
    gradient's entries, as the backward leaves it."""

    loss: float
    zeros: float
    skipped: int
    scale: float
    right: int


def flow_loss(weight: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Rectified flow in the dtype of the model's weights; the mean is fp32."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        s = t[:, None, None, None]
        dtype = next(model.parameters()).dtype
        velocity = model(((1 - s) * x + s * noise).to(dtype), t.to(dtype), y)
        return weight * F.mse_loss(velocity.float(), noise - x)

    return loss


def run(name: str, start: DiT, steps: int, batch: int, weight: float, mode: str) -> Outcome:
    """Train a copy of `start` and sample 100 digits from it in fp32."""
    model = copy.deepcopy(start).to(FP16 if "weights" in name else torch.float32)
    torch.manual_seed(1)
    rate = fc.optim.constant(8e-3, min(100, steps // 4))
    step = fc.compile_training_step(model, flow_loss(weight), lr=rate, mode=mode, **ARMS[name])
    feed, losses = batches(*real_digits(torch.device("cpu")), batch), []
    for _ in range(steps):
        losses.append(step(*next(feed)))
    metrics = step.metrics
    skipped, scale = int(metrics["skipped"]), float(metrics.get("loss_scale", torch.ones(())))
    step.release()
    with torch.autocast("cpu", FP16, enabled="autocast" in name):
        (flow_loss(weight)(model, *next(feed)) * scale).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    zeros = sum(int((g == 0).sum()) for g in gradients) / sum(g.numel() for g in gradients)
    asked = torch.arange(10).repeat_interleave(10)
    noise = torch.randn(len(asked), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    trained = model.float().eval()
    with torch.no_grad():
        times = torch.linspace(1, 0, 41)[:-1]
        images = euler_loop(trained, times)(noise, asked)
    right = int((read_digits(images) == asked.numpy()).sum()) if bool(images.isfinite().all()) else 0
    return Outcome(float(torch.stack(losses[-50:]).mean()) / weight, zeros, skipped, scale, right)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--weight", type=int, default=12, help="the loss is multiplied by 2 to the minus this")
    parser.add_argument("--mode", default="eager", help="torch.compile's modes or 'eager' (default)")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=[*ARMS])
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    start = DiT(depth=options.depth)
    table = Table("", "loss", "zero gradients", "skipped", "last scale", "right of 100")
    console = Console(width=110)
    for name in options.only:
        found = run(name, start, options.steps, options.batch, 2.0**-options.weight, options.mode)
        cells = f"{found.loss:.3f}", f"{found.zeros:.1%}", str(found.skipped), f"{found.scale:g}", str(found.right)
        table.add_row(name, *cells)
        console.print(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
