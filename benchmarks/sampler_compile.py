"""Seconds until a sampler's first step, by the number of blocks, beside the model compiled whole and block by block.

    python benchmarks/sampler_compile.py [--depths 4 12 28] [--whole] [--json docs/benchmarks/sampler-compile-cpu.json]

Each figure is a process of its own with an empty cache: from the compiled object to its first output, imports and the
model's construction left out. "block by block" is ``block.compile()`` on every block, which compiles one and is what
diffusers calls regional compilation. The seconds that torch.compile took (Dynamo, AOTAutograd and Inductor, by torch's
own clock) are shown apart: the rest of the sampler's figure is mostly torch.export, which traces every block. `--whole`
adds ``torch.compile(model)``, which takes minutes at 28 blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import machine, print_machine, print_table, write_json

sys.path[:0] = [str(Path(__file__).parents[1] / "examples")]

from dit import DiT  # noqa: E402

CONTENDERS = ("block by block", "optimize_sampler", "torch.compile(model)")


def first_step(contender: str, depth: int, device: torch.device) -> dict[str, float]:
    """Seconds of the first call, and of what torch.compile took of them."""
    from torch._dynamo.utils import compilation_time_metrics

    from fusion_compile.sampler import optimize_sampler

    torch.manual_seed(0)
    model = DiT(32, 2, 4, hidden_size=128, depth=depth, num_heads=4, num_classes=10).to(device).eval()
    x, t, y = torch.randn(1, 4, 32, 32, device=device), torch.ones(1, device=device), torch.ones(1).long().to(device)
    mode = "max-autotune" if device.type == "cuda" else None
    began = time.perf_counter()
    with torch.no_grad():
        if contender == "optimize_sampler":
            optimize_sampler(model, 4, timesteps=torch.linspace(1, 0, 5)[:-1])(x, t, y)
        elif contender == "block by block":
            for block in model.blocks:
                block.compile(mode=mode)
            model(x, t, y)
        else:
            torch.compile(model, mode=mode, fullgraph=True)(x, t, y)
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "torch.compile": sum(compilation_time_metrics["_compile.compile_inner"])}


def in_a_process(contender: str, depth: int, device: str) -> dict[str, float]:
    """`first_step` with nothing compiled before."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", contender, "--depths", str(depth), "--device", device]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 12, 28])
    parser.add_argument("--whole", action="store_true", help="torch.compile(model) too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(first_step(options.one, options.depths[0], torch.device(options.device))))
        return
    facts = machine(torch.device(options.device))
    print_machine(facts)
    results: list[dict[str, Any]] = []
    for depth in options.depths:
        for contender in CONTENDERS[: 3 if options.whole else 2]:
            results.append({"contender": contender, "depth": depth, **in_a_process(contender, depth, options.device)})
    for title, key in (("seconds to the first step", "seconds"), ("of which torch.compile", "torch.compile")):
        rows = [
            (name, *(f"{r[key]:.1f}" for r in results if r["contender"] == name))
            for name in CONTENDERS[: 3 if options.whole else 2]
        ]
        print_table(title, ("", *(f"{depth} blocks" for depth in options.depths)), rows)
    if options.json:
        write_json(options.json, {"machine": facts, "results": results})


if __name__ == "__main__":
    main()
