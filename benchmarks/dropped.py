"""Memory that stays when steps, torch optimizers, samplers and explanations are made and dropped, as in a sweep.

    python benchmarks/dropped.py [--times 30] [--backend inductor]

Each kind runs in a process of its own, on one model and on new models. Counted is the memory in which living tensors
lie, after the first and after the last, without the model itself.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import warnings

import torch
from torch import Tensor, nn

import fusion_compile as fc

WIDTH = 512


class Timed(nn.Module):
    """A model that is conditioned on time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.into, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.into(x) * (1 + self.time(torch.cos(t[:, None] * torch.arange(16)))))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def step(model: nn.Module, backend: str) -> None:
    made = fc.compile_training_step(model, squares, optimizer="adamw", ema=fc.EMA(model), backend=backend)
    made(torch.randn(2, WIDTH))
    made(torch.randn(2, WIDTH))


def facade(model: nn.Module, backend: str) -> None:
    optimizer = fc.optim.as_torch_optimizer(model, "sf_adamw", backend=backend)
    for _ in range(2):
        optimizer.zero_grad()
        squares(model, torch.randn(2, WIDTH)).backward()
        optimizer.step()
    optimizer.zero_grad()


def sampler(model: nn.Module, backend: str) -> None:
    made = fc.optimize_sampler(model.eval().requires_grad_(False), n_steps=4, backend=backend)
    for t in (1.0, 0.75, 0.5, 0.25):
        made(torch.randn(2, 8), torch.full((2,), t))


def explanation(model: nn.Module, backend: str) -> None:
    str(fc.explain(model, (torch.randn(2, WIDTH),), backend=backend))


KINDS = {"training step": step, "torch optimizer": facade, "sampler": sampler, "explanation": explanation}


def alive() -> int:
    """Bytes of memory in which tensors lie, each byte once."""
    gc.collect()
    spans = sorted(
        (t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        for t in gc.get_objects()
        if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.layout is torch.strided
    )
    total = end = 0
    for start, size in spans:
        total += max(0, start + size - max(end, start))
        end = max(end, start + size)
    return total


def run(kind: str, same: bool, times: int, backend: str) -> None:
    """Print the row of one kind."""
    warnings.simplefilter("ignore")

    def new() -> nn.Module:
        return Timed() if kind == "sampler" else nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    model, held = new(), []
    own = sum(p.numel() * 4 for p in model.parameters())
    for _ in range(times):
        model = model if same else new()
        KINDS[kind](model, backend)
        held.append((alive() - own) / 2**20)
    print(f"| {kind} | {'one model' if same else 'new models'} | {held[0]:.1f} MiB | {held[-1]:.1f} MiB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--kind")
    parser.add_argument("--same", action="store_true")
    args = parser.parse_args()
    if args.kind:
        run(args.kind, args.same, args.times, args.backend)
        return
    print(
        f"| {args.times} times, {args.backend} | on | after one | after {args.times} |\n|---|---|---|---|", flush=True
    )
    for kind in KINDS:
        for same in ([], ["--same"]):
            given = ["--kind", kind, "--times", str(args.times), "--backend", args.backend, *same]
            subprocess.run([sys.executable, __file__, *given], check=True)


if __name__ == "__main__":
    main()
