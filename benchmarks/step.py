"""The whole training step against the ordinary loop, ``torch.compile(model)`` and fused AdamW, in one process.

    python benchmarks/step.py [--model small] [--batch 128] [--recipes adamw,sf_normuon] [--json step.json]
    python benchmarks/step.py --only speed        # or memory, or compile; several with commas
    python benchmarks/step.py --regions --depth 12   # granularity="region" beside each recipe; blocks of "small"

Three tables. Speed: medians and the median of the per-round ratios, contenders by turns, warm-up outside. Memory: the
highest point of one step. Compile: seconds of the first call, each in a process of its own with an empty cache on disk
("cold") and again with what the first one left there ("warm"), and of CPU time with the C++ compiler's, which other
work on the machine disturbs less; the peer compiles forward and backward only. On a GPU the loss runs under bfloat16
autocast and the default mode is max-autotune, for both sides; on a CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent / "examples", HERE.parent):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from _measure import (  # noqa: E402
    compare,
    interleaved,
    machine,
    peak_of_call,
    print_machine,
    print_table,
    print_timings,
    wait,
    write_json,
)
from _training_loops import (  # noqa: E402
    MODELS,
    Loop,
    LossFn,
    build,
    compiled_model_loop,
    images,
    in_bfloat16,
    loss_drawing_noise,
)
from dit import DiT  # noqa: E402
from torch import Tensor  # noqa: E402

import fusion_compile as fc  # noqa: E402

LOOP = "compiled model + AdamW(fused)"
FORWARD_BACKWARD = "compiled model, forward + backward"
PARTS = ("speed", "memory", "compile")
BY_REGION = " in regions"


class Contenders:
    """Steps by name on the arguments' model and batch, each with a model of its own."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mode = arguments.mode or ("max-autotune" if self.device.type == "cuda" else "default")
        self.loss_fn: LossFn = loss_drawing_noise if self.device.type == "cpu" else in_bfloat16(loss_drawing_noise)
        self._make = MODELS[arguments.model]
        if arguments.depth is not None:
            self._make = partial(DiT, 8, 2, 1, hidden_size=128, depth=arguments.depth, num_heads=4)
        self.batch = images(build(self._make, torch.device("cpu")), arguments.batch, self.device)

    def build(self, name: str) -> Loop:
        """`LOOP`, `FORWARD_BACKWARD` or a recipe's name, with `BY_REGION` behind it for a step in regions."""
        model = build(self._make, self.device)
        if name == LOOP:
            return compiled_model_loop(model, self.loss_fn, mode=self._torch_mode)
        if name == FORWARD_BACKWARD:
            compiled = torch.compile(model, mode=self._torch_mode)

            def forward_backward(*batch: Tensor) -> Tensor:
                loss = self.loss_fn(compiled, *batch)
                loss.backward()
                return loss.detach()

            return Loop(forward_backward, lambda: iter(model.parameters()))
        recipe, granularity = name.removesuffix(BY_REGION), "region" if name.endswith(BY_REGION) else "program"
        options: dict[str, Any] = {"optimizer": recipe, "granularity": granularity, "mode": self.mode}
        step = fc.compile_training_step(model, self.loss_fn, **options)
        return Loop(step, lambda: iter([*step._state.values(), *model.parameters(), *model.buffers()]))

    @property
    def _torch_mode(self) -> str | None:
        return None if self.mode == "default" else self.mode

    def call(self, step: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            torch.compiler.cudagraph_mark_step_begin()
            return step(*self.batch)

        return run


def main() -> None:
    """Run the parts and print their tables."""
    arguments = parse()
    contenders = Contenders(arguments)
    if arguments.first_call is not None:
        print(json.dumps(first_call(contenders, arguments.first_call)))
        return
    facts = machine(contenders.device)
    print_machine(facts)
    blocks = "" if arguments.depth is None else f" of {arguments.depth} blocks"
    about = f"{arguments.model}{blocks}, batch {arguments.batch}, mode {contenders.mode}"
    parts = arguments.only.split(",")
    content: dict[str, Any] = {
        "machine": facts,
        "model": arguments.model,
        "batch": arguments.batch,
        "mode": contenders.mode,
    }
    if "compile" in parts:
        content["compile_seconds"] = compile_table(about, arguments)
    if {"speed", "memory"} & set(parts):
        content |= step_tables(about, contenders, arguments, parts)
    if arguments.json:
        write_json(arguments.json, content)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--recipes", default="adamw,sf_normuon")
    parser.add_argument("--mode", help="of torch.compile, for all contenders")
    parser.add_argument("--depth", type=int, help="blocks of the small model, in place of 4")
    parser.add_argument("--regions", action="store_true", help="each recipe with granularity='region', too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only.split(",")) - set(PARTS)):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    if unknown := sorted(set(arguments.recipes.split(",")) - set(fc.optim.RECIPES)):
        parser.error(f"--recipes knows {', '.join(fc.optim.RECIPES)}, not {', '.join(unknown)}")
    if arguments.depth is not None and arguments.model != "small":
        parser.error(f"--depth is for --model small, not {arguments.model}")
    return arguments


def names(arguments: argparse.Namespace) -> list[str]:
    """The steps of ours to build."""
    recipes: list[str] = arguments.recipes.split(",")
    return [name + end for name in recipes for end in ("", *([BY_REGION] if arguments.regions else []))]


def step_tables(
    about: str, contenders: Contenders, arguments: argparse.Namespace, parts: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Speed and memory, of steps compiled once for both."""
    loops: dict[str, Loop] = {}
    peaks: dict[str, int] = {}
    device = contenders.device
    content: dict[str, dict[str, Any]] = {}
    for name in (LOOP, *names(arguments)):
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        loop = contenders.build(name)
        label = name if name == LOOP else f"fusion_compile {name}"
        run = contenders.call(loop.step)
        run()
        if "memory" in parts:
            peaks[label] = _peak(run, device, loop, held)
        loops[label] = loop
    if "speed" in parts:
        runs = {label: contenders.call(loop.step) for label, loop in loops.items()}
        timings = compare(
            interleaved(runs, device, rounds=arguments.rounds, calls=3 if device.type == "cuda" else 1), LOOP
        )
        print_timings(f"one step: {about}", timings)
        content["speed"] = {name: t.__dict__ for name, t in timings.items()}
    if "memory" in parts:
        rows = [(n, f"{p / 2**20:.1f}", f"{p / peaks[LOOP]:.2f}") for n, p in peaks.items()]
        print_table(f"highest point of memory in a step: {about}", ("", "MiB", "ratio"), rows)
        content["peak_bytes"] = dict(peaks)
    return content


def _peak(run: Callable[[], object], device: torch.device, loop: Loop, held: int) -> int:
    if device.type == "cpu":
        return peak_of_call(run, device, loop.kept)
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(4):  # the recording of a CUDA graph is among them: a replay allocates nothing
        run()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - held


def compile_table(about: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of the first call, cold and warm."""
    seconds = {}
    for name in (FORWARD_BACKWARD, *names(arguments)):
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (_first_call_apart(name, arguments, cache) for _ in range(2))
        seconds[name] = {"cold": cold["seconds"], "cold_cpu": cold["cpu_seconds"], "warm": warm["seconds"]}
    peer = seconds[FORWARD_BACKWARD]
    rows = [
        (
            name if name == FORWARD_BACKWARD else f"fusion_compile {name}, whole step",
            f"{s['cold']:.1f}",
            f"{s['cold'] / peer['cold']:.2f}",
            f"{s['cold_cpu']:.1f}",
            f"{s['cold_cpu'] / peer['cold_cpu']:.2f}",
            f"{s['warm']:.1f}",
        )
        for name, s in seconds.items()
    ]
    print_table(f"seconds of the first call: {about}", ("", "cold", "ratio", "of CPU", "ratio", "warm"), rows)
    return seconds


def _first_call_apart(name: str, arguments: argparse.Namespace, cache: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--first-call", name]
    command += ["--model", arguments.model, "--batch", str(arguments.batch)]
    command += ["--mode", arguments.mode] if arguments.mode else []
    command += ["--depth", str(arguments.depth)] if arguments.depth is not None else []
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    environment.pop("TRITON_CACHE_DIR", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_call(contenders: Contenders, name: str) -> dict[str, float]:
    """Seconds from building the step to its first result, of the clock and of CPU time with all children's; importing
    torch and its compiler is outside."""
    import torch._inductor.async_compile
    import torch._inductor.compile_fx

    wait(contenders.device)
    began, worked = time.perf_counter(), _cpu_seconds()
    contenders.build(name).step(*contenders.batch)
    wait(contenders.device)
    seconds = time.perf_counter() - began
    torch._inductor.async_compile.shutdown_compile_workers()  # the system counts children that have ended
    return {"seconds": seconds, "cpu_seconds": _cpu_seconds() - worked}


def _cpu_seconds() -> float:
    """User time of this process and of its children that have ended."""
    return sum(resource.getrusage(whose).ru_utime for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
