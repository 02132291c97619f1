"""The models that people run: what a sampler does to each, measured on tiny ones and counted at full size.

    python benchmarks/sampler_models.py [--tiny] [--full] [--exported] [--only NAME ...] [--render]

`--tiny` runs every tiny model of tests/models on the CPU in fp32 and eager mode: a schedule of eight steps with two
requests, the difference to the model, the bytes freed. `--exported` tries every transformer, UNet and prior class that
diffusers exports, at tiny size: exact, or refused with its reason. `--full` exports every published configuration on
meta tensors, which take no memory for weights, and half a minute to several minutes each. All keep what they find in a
JSON file, model by model, and write docs/sampler-models.md from it; without one nothing runs and the page is written
again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import machine, write_json
from _published_configs import PUBLISHED
from torch import Tensor
from torch.utils import _pytree as pytree

from fusion_compile._sampler.without_weights.analysis import analyse_without_data
from fusion_compile._sampler.without_weights.diffusers_calls import model_of_class
from fusion_compile._sampler.without_weights.target import Built, with_example
from fusion_compile.sampler import Batched, Sampler, optimize_sampler

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from _sampler_models_page import page  # noqa: E402

from tests.models.cases import N_STEPS, NAMES, Case, case  # noqa: E402
from tests.models.exported.run import EXPORTED, NOT_TRIED, outcome  # noqa: E402


def measure_tiny(name: str) -> dict[str, Any]:
    """A schedule with two requests through the exact and the batched sampler, then without the hoisted weights."""
    torch.manual_seed(1)
    c = case(name)
    exact, batched = _sampler(c), _sampler(c, conditioning=Batched())
    calls = [c.at(request, i) for request in (c.call(), c.call()) for i in range(N_STEPS)]
    with torch.no_grad():
        expected = [c.model(**arguments) for arguments in calls]
    exact_difference = max(map(_difference, (exact(**a) for a in calls), expected))
    batched_difference = max(map(_difference, (batched(**a) for a in calls), expected))
    report = exact.report.programs[0]
    freed = exact.release_weights(to="drop")
    freed_difference = max(map(_difference, (exact(**a) for a in calls[N_STEPS:]), expected[N_STEPS:]))
    return {
        "roles": report.roles,
        "nodes": report.nodes,
        "launches": report.launches,
        "parameters": report.parameters,
        "exact_difference": max(exact_difference, freed_difference),
        "batched_difference": batched_difference,
        "largest_output": max(float(t.abs().max()) for out in expected for t in _tensors(out)),
        "rows_difference": batched.report.programs[0].measured_difference,
        "weight_bytes": report.weight_bytes,
        "freed_bytes": freed,
    }


def count_full(name: str) -> dict[str, Any]:
    """One published configuration without data, weights in bfloat16 but for what its class keeps in float32."""
    published = PUBLISHED[name]
    began = time.perf_counter()

    def build() -> Built:
        model = model_of_class(published.class_name, published.config)
        return with_example(model, torch.bfloat16, published.sizes)

    analysis = analyse_without_data(build, n_steps=published.steps)
    report = analysis.report
    return {
        "class": published.class_name,
        "steps": published.steps,
        "inputs": report.inputs,
        "roles": report.roles,
        "nodes": report.nodes,
        "body_nodes": report.body_nodes,
        "launches": report.launches,
        "weights": analysis.weights,
        "residuals": report.residuals,
        "table_bytes": report.table_bytes,
        "declined": [f"{d.node}: {d.reason}" for d in report.declined],
        "seconds": round(time.perf_counter() - began, 1),
    }


def _sampler(c: Case, **options: Any) -> Sampler:
    return optimize_sampler(c.model, N_STEPS, timesteps=c.schedule, mode="eager", **options)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(got: Any, expected: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(_tensors(got), _tensors(expected), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))  # type: ignore[union-attr]
    parser.add_argument("--tiny", action="store_true", help="run the tiny models")
    parser.add_argument("--exported", action="store_true", help="run every class that diffusers exports, at tiny size")
    parser.add_argument("--full", action="store_true", help="export the published configurations")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--missing", action="store_true", help="only what the JSON file does not have")
    parser.add_argument("--render", action="store_true", help="write the page from the JSON file; done in any case")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/benchmarks/sampler_models.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/sampler-models.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # diffusers warns of its own deprecated names
    results = json.loads(options.json.read_text()) if options.json.exists() else {"tiny": {}, "full": {}}
    work: list[tuple[str, str, Callable[[str], dict[str, Any]]]] = []
    if options.tiny:
        work += [("tiny", name, measure_tiny) for name in NAMES]
    if options.full:
        work += [("full", name, count_full) for name in PUBLISHED]
    if options.exported:
        results["not_tried"] = NOT_TRIED
        work += [("exported", name, lambda name: outcome(name)._asdict()) for name in EXPORTED]
    results.setdefault("exported", {})
    for kind, name, run in work:
        if (options.only and name not in options.only) or (options.missing and name in results[kind]):
            continue
        print(f"{kind} {name}", flush=True)
        results[kind][name] = run(name)
        results["machine"] = machine(torch.device("cpu"))
        write_json(options.json, results)  # long runs: what is found is kept
    options.page.write_text(page(results, list(NAMES), list(PUBLISHED)))


if __name__ == "__main__":
    main()
