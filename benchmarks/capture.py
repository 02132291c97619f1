"""CPU seconds of capturing a step both ways, and microseconds that a call of it costs the host.

    python benchmarks/capture.py [--blocks 4 12 28] [--parameters 50 500] [--rounds 3] [--calls 300]

"read" and "run" of the first table are process time of the first call on one thread under aot_eager, which compiles
nothing: rehearsal, examination, capture, AOTAutograd's trace and one step, for diffusion transformers of width 128. The
second table is wall time of a call of the step that Inductor compiled, for so many parameters of 4 entries each. It is
next to no arithmetic: what is left is the host's, guards in a step that is read and the watch in one that was run. The
watch alone is what a step that was run asks before each call: whether anything changed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
os.environ["FUSION_COMPILE_PROGRESS"] = "0"

import torch
import torch.nn.functional as F
from _measure import machine, print_machine, print_table
from dit import DiT
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._step.run_step import RunStep

Way = Literal["read", "run"]
WAYS: tuple[Way, Way] = ("read", "run")


def diffusion_loss(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x, t, y), x)


def seconds_of_capture(way: Way, blocks: int) -> float:
    """Process time of one first call."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=128, depth=blocks, num_heads=4, mlp_ratio=2.0, class_dropout_prob=0.0)
    step = fc.compile_training_step(model, diffusion_loss, optimizer="adamw", capture=way, backend="aot_eager")
    batch = torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    begin = time.process_time()
    step(*batch)
    return time.process_time() - begin


class Scales(nn.Module):
    """A module for each parameter, of 4 entries."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.LayerNorm(4, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.stack([part.weight for part in self.parts]).sum(0)  # type: ignore[arg-type]


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return statistics.median(times)


def microseconds_of_call(way: Way, parameters: int, calls: int) -> tuple[float, float | None]:
    """Of a whole call of the step, and of the watch in it, which a step that was read does not have."""
    torch.compiler.reset()
    step = fc.compile_training_step(
        Scales(parameters), lambda model, x: model(x).mean(), optimizer="adamw", capture=way, backend="inductor"
    )
    x = torch.ones(2, 4)
    for _ in range(20):
        step(x)
    whole = microseconds(lambda: step(x), calls)
    watches = [each._watch for found in step._programs._steps.values() for each in found if isinstance(each, RunStep)]
    return whole, microseconds(watches[0].changed, calls) if watches and watches[0] is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 12, 28])
    parser.add_argument("--parameters", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print_machine(machine(torch.device("cpu")))
    seconds_of_capture("read", 1), seconds_of_capture("run", 1)  # imports and first uses
    rows = []
    for blocks in args.blocks:
        taken = {way: [seconds_of_capture(way, blocks) for _ in range(args.rounds)] for way in WAYS}
        read, run = (statistics.median(taken[way]) for way in WAYS)
        rows.append([str(blocks), f"{read:.1f}", f"{run:.1f}", f"{run / read:.2f}"])
    print_table("CPU seconds of the first call, nothing compiled", ["blocks", *WAYS, "run / read"], rows)
    rows = []
    for count in args.parameters:
        (read, _), (run, watch) = (microseconds_of_call(way, count, args.calls) for way in WAYS)
        found = [f"{read:.0f}", f"{run:.0f}", f"{watch:.0f}"]
        rows.append([str(count), *found])
    print_table("Microseconds of a call on the host", ["parameters", *WAYS, "the watch alone"], rows)


if __name__ == "__main__":
    main()
