"""A denoising loop: the model as it is, ``torch.compile(model)``, a time cache written by hand and `optimize_sampler`,
alternating in one process.

    python benchmarks/sampler.py [--quick] [--models S B XL] [--batches 1 2 4 8] [--steps 20] [--json FILE]

Each contender denoises one batch with class labels over the whole schedule, called as the model is called; the table
gives milliseconds of one step. "new request" changes the labels before each batch, so that what depends on them is
computed again for all steps. DiT-S/2, B/2 and XL/2 over latents of 32x32x4, random weights that are nowhere zero;
`--quick` takes the digits example's model. Memory is the highest point of one call, with the weights, before and after
`release_weights`.
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
from _measure import compare, interleaved, machine, peak_of_call, print_machine, print_table, tensor_bytes, write_json
from torch import Tensor, nn

from fusion_compile.sampler import Sampler, optimize_sampler

sys.path[:0] = [str(Path(__file__).parents[1] / "examples")]

from _hand_written_cache import HandWrittenCache  # noqa: E402
from dit import DiT, dit_b_2, dit_s_2, dit_xl_2  # noqa: E402

Denoise = Callable[[], Tensor]
MODELS: dict[str, Callable[[], DiT]] = {"digits": DiT, "S": dit_s_2, "B": dit_b_2, "XL": dit_xl_2}


def random_model(name: str, device: torch.device) -> DiT:
    """In eval mode; adaLN-zero's zeros replaced, because a product with zero hides what was computed."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[name]()
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
    y = torch.arange(batch, device=device) % 10
    schedule = torch.linspace(1, 0, n_steps + 1)[:-1].to(device, dtype)
    sampler = optimize_sampler(copy.deepcopy(model), n_steps, timesteps=schedule, mode=mode)
    fresh = optimize_sampler(sampler.model, n_steps, timesteps=schedule, mode=mode)
    compile_mode = None if mode == "default" or (mode is None and device.type == "cpu") else mode or "max-autotune"

    def lower(fn: Any) -> Any:
        return torch.compile(fn, mode=compile_mode, fullgraph=True, dynamic=False)

    compiled = lower(model)
    cached, cached_and_compiled = HandWrittenCache(model, schedule), HandWrittenCache(model, schedule, lower)
    counter = iter(range(10**9))

    def new_request(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Denoise:
        return lambda: loop(call, noise, (y + next(counter)) % 10, schedule)

    contenders: dict[str, Denoise] = {
        "eager": lambda: loop(model, noise, y, schedule),
        "torch.compile(model)": lambda: loop(compiled, noise, y, schedule),
        "cache by hand": lambda: loop(cached, noise, y, schedule),
        "cache by hand, rest compiled": lambda: loop(cached_and_compiled, noise, y, schedule),
        "optimize_sampler": lambda: loop(sampler, noise, y, schedule),
        "optimize_sampler, new request": new_request(fresh),
    }
    warmup = 2 if device.type == "cuda" else 1  # on a GPU the second call records
    timings = compare(interleaved(contenders, device, rounds=rounds, warmup=warmup), "torch.compile(model)")
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
        **memory(sampler, model, call),
    }


def memory(sampler: Sampler, model: nn.Module, call: tuple[Tensor, ...]) -> dict[str, Any]:
    """Counts from the sampler's report, the bytes that dropping gives back and the highest point of a call before and
    after; the last thing done with `sampler`."""
    explanation = str(sampler.report)
    report = sampler.report.programs[0]
    table = report.table_bytes
    before = _peak(lambda: sampler(*call), sampler.model, table)
    released = sampler.release_weights(to="drop")
    return {
        "explain": explanation,
        "launches": report.launches,
        "table_bytes": table,
        "weight_bytes": tensor_bytes(model.parameters()),
        "released_bytes": released,
        "peak_bytes": {
            "torch model": _peak(lambda: model(*call), model, 0),
            "sampler": before,
            "sampler, weights dropped": _peak(lambda: sampler(*call), sampler.model, table),
        },
    }


def _peak(run: Denoise, model: nn.Module, table_bytes: int) -> int:
    """Bytes at the highest point of one call: on a CPU the weights, the table and what the call allocates; on a GPU
    what the allocator gave out, of which `main` sees to it that no other model is part."""
    weight = next(model.parameters())

    def kept() -> list[Tensor]:
        return [*model.parameters(), *model.buffers()]

    with torch.no_grad():
        if weight.device.type == "cpu":
            return peak_of_call(run, weight.device, kept) + table_bytes
        run()
        torch.cuda.synchronize()
        standing = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - standing + tensor_bytes(kept()) + table_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="the digits example's model and few rounds")
    parser.add_argument("--models", choices=MODELS, nargs="+", help="default: all on a GPU, S on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 2 4 8 on a GPU, 1 2 on a CPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mode", default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/sampler.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    facts = machine(device)
    print_machine(facts)
    on_gpu = device.type == "cuda"
    options.models = options.models or (["S", "B", "XL"] if on_gpu else ["S"])
    options.batches = options.batches or ([1, 2, 4, 8] if on_gpu else [1, 2])
    if options.quick:
        options.models, options.batches, options.rounds = ["digits"], options.batches[:1], 3
    results = []
    for name in options.models:
        for batch in options.batches:
            result = {"model": name} | measure(
                random_model(name, device), batch, options.steps, options.rounds, options.mode
            )
            results.append(result)
            show(result)
            write_json(options.json, {"machine": facts, "results": results})  # long runs: what is measured is kept
            torch.compiler.reset()


def show(result: dict[str, Any]) -> None:
    """One model at one batch size, as a table and two lines."""
    rows = [
        (name, f"{t['ms_per_step']:.2f}", f"{t['ratio']:.2f}", f"{t['spread']:.0%}")
        for name, t in result["timings"].items()
    ]
    title = f"DiT-{result['model']}, batch {result['batch']}, {result['n_steps']} steps"
    print_table(title, ("", "ms a step", "ratio", "spread"), rows)
    peaks = ", ".join(f"{name} {n / 2**20:.1f}" for name, n in result["peak_bytes"].items())
    print(
        f"kernels of an eager step {result['launches'][0]} -> {result['launches'][1]}; table "
        f"{result['table_bytes'] / 2**20:.1f} MiB; released {result['released_bytes'] / 2**20:.1f} of "
        f"{result['weight_bytes'] / 2**20:.1f} MiB of weights; largest difference to eager "
        f"{result['largest difference']:.2e} of {result['largest value']:.2e}; peak MiB of a call: {peaks}",
        flush=True,
    )


if __name__ == "__main__":
    main()
