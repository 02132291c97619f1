"""Microseconds of the host's CPU that a call of a step costs beyond its kernels.

    python benchmarks/host.py [--parameters 50 500] [--calls 300] [--rounds 9]

The step is captured, proved and taken three times with its kernels; then they are taken out: what the compiler gave
returns what it returned before, at no cost. What is left is the host's: looking for parameters that were moved, guards
or the watch, the batch, metrics, versions. Process time of one thread, the best of so many rounds, because other work
on the machine only ever adds. "weights" is the search for parameters that were replaced, moved or frozen, "versions"
is what tells autograd that they were written, "watch" is the comparison of what a step that was run was captured from.
"torch optimizer" is ``optimizer.step()`` of `as_torch_optimizer`; its copies of small gradients are among it.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

os.environ["FUSION_COMPILE_PROGRESS"] = "0"

import torch
from _measure import machine, print_machine, print_table
from torch import Tensor, fx, nn

import fusion_compile as fc
from fusion_compile._step.run_step import RunStep

Way = Literal["read", "run", "run, in regions"]
WAYS: tuple[Way, ...] = ("read", "run", "run, in regions")


class Kernels:
    """A backend of torch.compile whose programs can be taken out."""

    def __init__(self) -> None:
        self.are_there = True

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        last: Any = None

        def program(*args: Tensor) -> Any:
            nonlocal last
            if self.are_there:
                last = graph(*args)
            return last

        return program


class Layers(nn.Module):
    """Two parameters a layer."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(parameters // 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def microseconds(call: Callable[[], object], calls: int, rounds: int) -> float:
    found = []
    for _ in range(rounds):
        begin = time.process_time_ns()
        for _ in range(calls):
            call()
        found.append((time.process_time_ns() - begin) / calls / 1e3)
    return min(found)


def row(way: Way, parameters: int, kernels: Kernels, calls: int, rounds: int) -> list[str]:
    torch.compiler.reset()
    kernels.are_there = True
    options: dict[str, Any] = {"capture": way.partition(",")[0], "granularity": "region" if "," in way else "program"}
    step = fc.compile_training_step(
        Layers(parameters), loss, optimizer="adamw", mode="default", backend="kernels_taken_out", **options
    )
    x = torch.randn(1, 16)
    for _ in range(3):
        step(x)
    kernels.are_there = False
    parts: list[Callable[[], object]] = [
        lambda: step(x),
        lambda: step._residence.check(),
        lambda: step._residence.say_written(),
    ]
    runs = [each for steps in step._programs._steps.values() for each in steps if isinstance(each, RunStep)]
    if runs and (watch := runs[0]._watch) is not None:
        parts.append(watch.changed)
    times = [f"{microseconds(part, calls, rounds):.0f}" for part in parts]
    return [str(parameters), way, *times, *([] if runs else ["-"])]


def of_an_optimizer(parameters: int, calls: int, rounds: int, kernels: Kernels) -> list[str]:
    torch.compiler.reset()
    kernels.are_there = True
    model = Layers(parameters)
    optimizer = fc.optim.as_torch_optimizer(model, "adamw", mode="default", backend="kernels_taken_out")
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, torch.randn(1, 16)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    kernels.are_there = False
    return [str(parameters), "torch optimizer", f"{microseconds(optimizer.step, calls, rounds):.0f}", "", "", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernels = Kernels()
    torch._dynamo.register_backend(kernels, name="kernels_taken_out")  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
    print_machine(machine(torch.device("cpu")))
    rows = [row(way, n, kernels, args.calls, args.rounds) for n in args.parameters for way in WAYS]
    rows += [of_an_optimizer(n, args.calls, args.rounds, kernels) for n in args.parameters]
    print_table(
        "Microseconds of the host's CPU a call", ["parameters", "way", "step()", "weights", "versions", "watch"], rows
    )


if __name__ == "__main__":
    main()
