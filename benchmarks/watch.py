"""Microseconds of one comparison of everything that a capture was made from, at 50 and 500 parameters.

    python benchmarks/watch.py [--blocks 3 28] [--calls 2000]

The model is a diffusion transformer's blocks, 18 parameters and 17 modules each, captured with its loss. "whole" is
one call, median and best of `--calls`; the other columns are its parts, each alone and therefore with warmer caches.
"turns" is the number of calls after which everything was compared; "values" is how many there are. "sampler" is one
call of a sampler's watch, which compares modules without turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _measure import machine, print_machine, print_table
from torch import Tensor, nn

from fusion_compile._capture.watch.reads import reading
from fusion_compile._capture.watch.scope import SAMPLER
from fusion_compile._capture.watch.watch import Watch


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // 4), nn.LayerNorm(width // 4)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.drop(self.out(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(0.1))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b = self.modulation(condition).chunk(2, -1)
        x = x + a * self.attention(self.norm1(x))
        return x + b * self.mlp(self.norm2(x))


class Blocks(nn.Module):
    def __init__(self, count: int, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(count))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


def loss(model: nn.Module, x: Tensor, condition: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(model(x, condition), target)


def microseconds(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Median and best."""
    for _ in range(calls // 10):
        call()
    times = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return statistics.median(times), min(times)


def row(blocks: int, calls: int) -> list[str]:
    model = Blocks(blocks)
    batch = torch.randn(2, 4, 16), torch.randn(2, 1, 16), torch.randn(2, 4, 16)
    with reading() as reads:
        loss(model, *batch)
    watch = Watch({"model": model, "loss": loss}, reads)
    parts = watch.parts()
    if watch.changed() is not None:
        raise RuntimeError("Nothing was changed, and a change was noticed.")
    whole, best = microseconds(watch.changed, calls)
    of_sampler, _ = microseconds(Watch({"": model}, scope=SAMPLER).changed, calls)
    return [
        str(len(list(model.parameters()))),
        str(watch.values),
        str(watch.turns),
        f"{whole:.1f} (best {best:.1f})",
        *(f"{microseconds(part, calls)[0]:.1f}" for part in parts.values()),
        f"{of_sampler:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 28])
    parser.add_argument("--calls", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_machine(machine(torch.device("cpu")))
    columns = ["parameters", "values", "turns", "whole", *Watch({}).parts(), "sampler"]
    print_table("Microseconds of a comparison", columns, [row(blocks, args.calls) for blocks in args.blocks])


if __name__ == "__main__":
    main()
