"""The optimizer against torch's own, on the same tensors in one process: the whole loop, and its step alone.

    python benchmarks/update.py [--rounds 15] [--only adapters] [--json update.json]

The whole loop is backward, ``step()``, ``zero_grad()``; what the backward costs without any optimizer is a row. Ours
may move large gradients into its banks within the backward, so the whole loop is the fair comparison. The step alone
finds its gradients where its own backward has left them: in ``.grad``, or in the banks. "ema" is what an average of the
weights adds: in our update, and beside it. Each round times every contender once, in turn; reported are
medians and the median of the per-round ratios, and bytes at the highest point of a loop. On a machine that does other
work use ``--cpu-time``, which counts the process's own time on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from _measure import (
    Timing,
    compare,
    interleaved,
    machine,
    peak_of_call,
    print_machine,
    print_table,
    print_timings,
    write_json,
)
from _optimizer_loops import ADAPTERS, DIT_S, Loop, Shapes, adamw, backward_alone, muon, ours, prodigyopt
from torch import nn

from fusion_compile import optim

FUSED, FOREACH, MUON = "torch AdamW(fused)", "torch AdamW(foreach)", "torch Muon + AdamW(fused)"
BACKWARD = "the backward alone"
Contenders = Mapping[str, Callable[[], Loop]]
Clock = Callable[[], float]


def elementwise(shapes: Shapes, device: torch.device) -> Contenders:
    """Recipes that update entry by entry, each with its default codec, some with others."""
    recipes = {
        "adamw": optim.adamw(lr=1e-3),
        "lion": optim.lion(),
        "lion bf16": optim.lion(momentum="bf16"),
        "lion int8": optim.lion(momentum="int8"),
        "adakaon without momentum": optim.adakaon(betas=(0.0, 0.999)),
        "adakaon": optim.adakaon(),
        "adakaon int8": optim.adakaon(momentum="int8"),
        "adakaon 4bit": optim.adakaon(momentum="4bit"),
        "adamuon": optim.adamuon(),
        "adapnm": optim.adapnm(),
        "prodigy": optim.prodigy(),
        "adafactor": optim.adafactor(),
        "adopt": optim.adopt(),
        "sf_adamw": optim.sf_adamw(),
    }
    return {f"fusion_compile {n}": lambda t=t: ours(shapes, t, device) for n, t in recipes.items()}


def sets_of(device: torch.device) -> dict[str, tuple[str, str, Contenders]]:
    """By name: title, the contender that the others are compared with, and all contenders."""

    def of_adamw(shapes: Shapes) -> Contenders:
        return {
            BACKWARD: lambda: backward_alone(shapes, device),
            FUSED: lambda: adamw(shapes, device, fused=True),
            FOREACH: lambda: adamw(shapes, device, foreach=True),
            "fusion_compile adamw": lambda: ours(shapes, optim.adamw(lr=1e-3), device),
        }

    def of_all(shapes: Shapes) -> Contenders:
        peers = {
            BACKWARD: lambda: backward_alone(shapes, device),
            FOREACH: lambda: adamw(shapes, device, foreach=True),
            "prodigyopt Prodigy": lambda: prodigyopt(shapes, device),
        }
        return {**peers, **elementwise(shapes, device)}

    matrices: Contenders = {
        BACKWARD: lambda: backward_alone(DIT_S, device),
        MUON: lambda: muon(DIT_S, device),
        "fusion_compile muon": lambda: ours(DIT_S, optim.muon(), device),
        "fusion_compile sf_normuon": lambda: ours(DIT_S, optim.sf_normuon(), device),
    }
    adapters, dit_s = "400 adapter tensors (16x640, 640x16)", "DiT-S set (120 tensors)"
    return {
        "adapters": (adapters, FUSED, of_adamw(ADAPTERS)),
        "dit_s_adamw": (dit_s, FUSED, of_adamw(DIT_S)),
        "dit_s_muon": (f"{dit_s}, Newton-Schulz in bf16", MUON, matrices),
        "adapters_families": (f"{adapters}, all recipes that update entries", FOREACH, of_all(ADAPTERS)),
        "dit_s_families": (f"{dit_s}, all recipes that update entries", FOREACH, of_all(DIT_S)),
    }


def measured(
    title: str, reference: str, contenders: Contenders, rounds: int, device: torch.device, clock: Clock
) -> dict[str, Any]:
    """Both tables of one set, and the bytes."""
    loops = {name: make() for name, make in contenders.items()}
    whole = compare(
        interleaved({n: loop.whole for n, loop in loops.items()}, device, rounds=rounds, clock=clock), reference
    )
    print_timings(f"{title}: the whole loop", whole)
    stepping = {n: loop for n, loop in loops.items() if n != BACKWARD}
    steps, before = {n: loop.step for n, loop in stepping.items()}, {n: loop.prepare for n, loop in stepping.items()}
    alone = compare(interleaved(steps, device, rounds=rounds, warmup=1, before=before, clock=clock), reference)
    print_timings(f"{title}: the step alone", alone)
    found: dict[str, Any] = {"whole": _plain(whole), "step": _plain(alone)}
    if device.type == "cpu":
        peaks = {n: peak_of_call(loop.whole, device, loop.kept) for n, loop in stepping.items()}
        rows = [(n, f"{p / 2**20:.1f}", f"{p / peaks[reference]:.3f}") for n, p in peaks.items()]
        print_table(f"{title}: highest point of memory in a loop", ("", "MiB", "ratio"), rows)
        found["peak_bytes"] = peaks
    return found


def averages(rounds: int, device: torch.device, clock: Clock) -> dict[str, Any]:
    """What one average of the DiT-S set's weights adds to a step: ours in the update, the others beside it."""
    without, with_ema = ours(DIT_S, optim.adamw(lr=1e-3), device), "fusion_compile adamw with an EMA"
    averaged = optim.averaged(optim.adamw(lr=1e-3), [optim.Average(rate=1e-4)])
    inside = ours(DIT_S, averaged, device)
    weights = [p.detach().clone() for p in without.model.parameters()]
    kept = [p.clone() for p in weights]
    runs: dict[str, Callable[[], object]] = {
        "fusion_compile adamw": without.step,
        with_ema: inside.step,
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(kept, weights, 1e-4),
        **_averages_of_others(weights),
    }
    before = {"fusion_compile adamw": without.prepare, with_ema: inside.prepare}
    times = interleaved(runs, device, rounds=rounds, before=before, clock=clock)
    added = [b - a for a, b in zip(times["fusion_compile adamw"], times[with_ema], strict=True)]
    mine = statistics.median(added)
    rows, found = [("in fusion_compile's update", f"{mine:.2f}", "")], {"added ms": mine}
    for name in list(runs)[2:]:
        ratio = statistics.median(a / t for a, t in zip(added, times[name], strict=True))
        rows.append((name, f"{statistics.median(times[name]):.2f}", f"{ratio:.2f}"))
        found[name] = ratio
    print_table("DiT-S set: what one EMA adds", ("", "ms", "ours / it"), rows)
    return found


def _averages_of_others(weights: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    from diffusers.training_utils import EMAModel

    parameters = [nn.Parameter(w.clone()) for w in weights]
    module = nn.ParameterList(parameters)
    swa = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9999))
    theirs = EMAModel(parameters, decay=0.9999)
    each = EMAModel(parameters, decay=0.9999, foreach=True)
    return {
        "torch AveragedModel": lambda: swa.update_parameters(module),
        "diffusers EMAModel": lambda: theirs.step(parameters),
        "diffusers EMAModel(foreach=True)": lambda: each.step(parameters),
    }


def _plain(timings: Mapping[str, Timing]) -> dict[str, Any]:
    return {name: timing.__dict__ for name, timing in timings.items()}


def main() -> None:
    """Run all sets and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = sets_of(device)
    parser.add_argument("--only", choices=[*sets, "ema"])
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time, on one thread")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    facts = machine(device)
    print_machine(facts)
    results = {}
    for key, (title, reference, contenders) in sets.items():
        if arguments.only in (None, key):
            results[key] = measured(title, reference, contenders, arguments.rounds, device, clock)
    if arguments.only in (None, "ema"):
        results["ema"] = averages(arguments.rounds, device, clock)
    if arguments.json:
        write_json(arguments.json, {"machine": facts, "sets": results})


if __name__ == "__main__":
    main()
