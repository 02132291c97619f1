"""A denoising loop: the model as it is, ``torch.compile(model)`` and `optimize_sampler`, by turns in one process.

    python benchmarks/sampler.py [--quick] [--batches 1 2] [--steps 20] [--json docs/benchmarks/sampler.json]

Each contender denoises one batch with class labels over the whole schedule, called as the model is called; the table
gives milliseconds of one step. "new request" changes the labels before each batch, so that the prologue for all steps
is part of the time. DiT-S/2 on a CPU, DiT-XL/2 on a GPU, random weights that are nowhere zero; `--quick` takes the
digits example's model.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import compare, interleaved, machine, print_machine, print_table, write_json
from torch import Tensor, nn

from fusion_compile.sampler import Sampler, optimize_sampler

sys.path[:0] = [str(Path(__file__).parents[1] / "examples")]

from dit import DiT, dit_s_2, dit_xl_2  # noqa: E402

Denoise = Callable[[], Tensor]


def random_model(quick: bool, device: torch.device) -> DiT:
    """In eval mode; adaLN-zero's zeros replaced, because a product with zero hides what was computed."""
    torch.manual_seed(0)
    model = DiT() if quick else dit_xl_2() if device.type == "cuda" else dit_s_2()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def loop(call: Callable[[Tensor, Tensor, Tensor], Tensor], noise: Tensor, y: Tensor, schedule: Tensor) -> Tensor:
    """Euler steps along `schedule`; `call` is the model or stands for it."""
    x, dt = noise, 1.0 / len(schedule)
    with torch.no_grad():
        for t in schedule:
            x = x - dt * call(x, t.expand(len(x)), y)
    return x


def measure(model: DiT, batch: int, n_steps: int, rounds: int, mode: str | None) -> dict[str, Any]:
    """All contenders at one batch size."""
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    side = round(model.pos_embed.shape[1] ** 0.5) * model.patch_size
    noise = torch.randn(batch, model.in_channels, side, side, device=device, dtype=dtype)
    y = torch.arange(batch, device=device)
    sampler = optimize_sampler(copy.deepcopy(model), n_steps, mode=mode)
    fresh = optimize_sampler(sampler.model, n_steps, mode=mode)
    compile_mode = None if mode == "default" or (mode is None and device.type == "cpu") else mode or "max-autotune"
    compiled = torch.compile(model, mode=compile_mode, fullgraph=True, dynamic=False)
    schedule = sampler.timesteps.to(device, dtype)
    counter = iter(range(10**9))

    def new_request() -> Tensor:
        return loop(fresh, noise, (y + next(counter)) % 10, schedule)

    contenders: dict[str, Denoise] = {
        "eager": lambda: loop(model, noise, y, schedule),
        "torch.compile(model)": lambda: loop(compiled, noise, y, schedule),
        "optimize_sampler": lambda: loop(sampler, noise, y, schedule),
        "optimize_sampler, new request": new_request,
    }
    timings = compare(interleaved(contenders, device, rounds=rounds, warmup=2), "torch.compile(model)")
    with torch.no_grad():
        call = (noise, schedule[n_steps // 2].expand(batch), y)
        difference = float((sampler(*call) - model(*call)).abs().max())
        scale = float(model(*call).abs().max())
    return {
        "batch": batch,
        "n_steps": n_steps,
        "timings": {name: dataclasses.asdict(t) | {"ms_per_step": t.ms / n_steps} for name, t in timings.items()},
        "largest difference": difference,
        "largest value": scale,
        **released(sampler, model),
    }


def released(sampler: Sampler, model: nn.Module) -> dict[str, Any]:
    """Counts from the sampler's report, and the bytes that dropping gives back; the last thing done with `sampler`."""
    explanation = sampler.explain()
    report = dataclasses.asdict(sampler.reports()[0])
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "explain": explanation,
        "launches": report["launches"],
        "table_bytes": report["table_bytes"],
        "weight_bytes": total,
        "released_bytes": sampler.free_hoisted_weights(to="drop"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="the digits example's model and few rounds")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mode", default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/sampler.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    facts = machine(device)
    print_machine(facts)
    rounds = 3 if options.quick else options.rounds
    results = []
    for batch in options.batches[:1] if options.quick else options.batches:
        model = random_model(options.quick, device)
        result = measure(model, batch, options.steps, rounds, options.mode)
        results.append(result)
        rows = [
            (name, f"{t['ms_per_step']:.2f}", f"{t['ratio']:.2f}", f"{t['spread']:.0%}")
            for name, t in result["timings"].items()
        ]
        print_table(f"batch {batch}, {options.steps} steps", ("", "ms a step", "ratio", "spread"), rows)
        print(
            f"kernels of an eager step {result['launches'][0]} -> {result['launches'][1]}; table "
            f"{result['table_bytes'] / 2**20:.1f} MiB; released {result['released_bytes'] / 2**20:.1f} of "
            f"{result['weight_bytes'] / 2**20:.1f} MiB of weights; largest difference to eager "
            f"{result['largest difference']:.2e} of {result['largest value']:.2e}",
            flush=True,
        )
        torch.compiler.reset()
    write_json(options.json, {"machine": facts, "results": results})


if __name__ == "__main__":
    main()
