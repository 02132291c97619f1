"""Write docs/sampler-models.md from the numbers of sampler_models.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

TIMES = {
    "const": "constant",
    "step": "step",
    "request": "request",
    "step_request": "step + request",
    "live": "live",
}
_EARLY = ("const", "step", "request", "step_request")

_HEAD = """# What the sampler does to the models that people run

Written by `python benchmarks/sampler_models.py` from `docs/benchmarks/sampler_models.json`; do not edit. `--full`
counts the published configurations again, `--tiny` measures the tiny ones. [The sampler](sampler.md) explains the
words.
"""

_FULL = """## Published configurations

These models were exported on tensors without data: no weights, no GPU, no claim about the time of sampling. Weights are
bfloat16, except those that a class keeps in float32. The call is the pipeline's: batch 2 where guidance doubles the
batch, batch 1 where guidance is distilled or makes two calls. The cost model uses a GPU's prices.

**Weights**, in GiB, by the binding time of their last reader. *Freed*: the weights that the loop does not read, which
`release_weights(to="drop")` gives back, and their share of the bytes; its count leaves out what the table holds of the
constant ones. *Unread*: weights on which the output does not depend (the text half of a last block).
"""

_GRAPH = """
**Calls** of the exported graph by binding time; **kernels** of one eager step, views not counted, before and after; the
**table**: values kept in packed rows and their bytes for one request and all steps. *Declined*: early values that the
loop computes itself because a row of them costs more. *Export*: seconds, on a busy machine.
"""

_TINY = """## Tiny models, run

The same classes with a few thousand weights, none of them zero, and models in the style of published code, in fp32 on
the CPU with `mode="eager"`. Each serves {n_steps} timesteps and two requests. *Exact*: the largest difference of any
output to the model's, before and after the hoisted weights are dropped; it has to be 0. *Batched*: the same for
`conditioning=Batched()`, beside the largest output. *Freed*: what `release_weights(to="drop")` returned, and its share
of the weights. No body takes a timestep, which the tests check too.
"""


_EXPORTED = """## Every class that diffusers exports

Every transformer, UNet and prior class of diffusers {version}, at tiny size, in fp32 on the CPU with `mode="eager"`:
two requests at three timesteps, with other latents at each. *Exact*: bitwise the model's. *Freed*: the share of the
weights that `release_weights(to="drop")` returned. Classes of the table above are not repeated. What is refused, or
left to the whole model, has its sentence below.
"""


def page(results: dict[str, Any], tiny: Sequence[str], full: Sequence[str]) -> str:
    """The whole page; models that have no numbers yet are left out."""
    counted = {name: results["full"][name] for name in full if name in results["full"]}
    measured = {name: results["tiny"][name] for name in tiny if name in results["tiny"]}
    machine = results.get("machine", {})
    parts = [_HEAD, _FULL, _weights(counted), _GRAPH, _graphs(counted), "", _declined(counted), ""]
    parts += [_TINY.format(n_steps=8), _measured(measured), ""]
    tried = results.get("exported", {})
    if tried:
        parts += [
            _EXPORTED.format(version=results.get("diffusers", "0.42.1")),
            _tried(tried),
            "",
            _said(tried, results.get("not_tried", {})),
            "",
        ]
    parts.append(f"Last run {machine.get('date', '?')}, torch {machine.get('torch', '?')}, {machine.get('cpu', '?')}.")
    return "\n".join(parts) + "\n"


def _weights(counted: dict[str, Any]) -> str:
    rows = []
    for name, numbers in counted.items():
        weights = numbers["weights"]
        total = sum(size for _, size in weights.values())
        freed = sum(weights[time][1] for time in _EARLY)
        rows.append(
            [
                name,
                f"{sum(count for count, _ in weights.values()) / 1e6:,.1f} M",
                *(_gib(weights[time][1]) for time in TIMES),
                _gib(weights["unread"][1]),
                f"{_gib(freed)} ({freed / total:.1%})",
            ]
        )
    return _table(["model", "parameters", *TIMES.values(), "unread", "freed"], rows)


def _graphs(counted: dict[str, Any]) -> str:
    rows = [
        [
            f"{name}, {numbers['steps']} steps",
            *(str(numbers["nodes"].get(time, 0)) for time in TIMES),
            "{} → {}".format(*numbers["launches"]),
            str(numbers["residuals"]),
            f"{numbers['table_bytes'] / 2**20:,.1f} MiB",
            str(len(numbers["declined"])),
            f"{numbers['seconds']:.0f}",
        ]
        for name, numbers in counted.items()
    ]
    return _table(["model", *TIMES.values(), "kernels", "values", "table", "declined", "export"], rows)


def _declined(counted: dict[str, Any]) -> str:
    """Why, with the operators and how many of each."""
    lines = []
    for name, numbers in counted.items():
        operators = Counter(_operator(line) for line in numbers["declined"])
        if operators:
            several = ", ".join(f"{n} {operator}" for operator, n in operators.most_common(4))
            more = len(operators) - 4
            lines.append(
                f"- {name}: {several}{f' and {more} other operators' if more > 0 else ''}. The first: "
                f"{numbers['declined'][0].partition(': ')[2]}"
            )
    return "\n".join(["**What is declined**, by operator, and the first reason:", "", *lines]) if lines else ""


def _operator(line: str) -> str:
    words = line.partition(": ")[2]
    return words.partition(":")[0] if ":" in words else words.split()[0]


def _measured(measured: dict[str, Any]) -> str:
    rows = []
    for name, numbers in measured.items():
        total = sum(numbers["weight_bytes"].values())
        rows.append(
            [
                name,
                " / ".join(str(numbers["nodes"].get(time, 0)) for time in TIMES),
                "{} → {}".format(*numbers["launches"]),
                f"{numbers['exact_difference']:g}",
                f"{numbers['batched_difference']:.1e} of {numbers['largest_output']:.3g}",
                f"{numbers['freed_bytes'] / 2**10:,.1f} KiB ({numbers['freed_bytes'] / total:.1%})",
            ]
        )
    head = ["model", "calls " + " / ".join(TIMES.values()), "kernels", "exact", "batched", "freed"]
    return _table(head, rows)


def _tried(tried: dict[str, Any]) -> str:
    rows = []
    for name, numbers in sorted(tried.items()):
        whole = numbers["said"] and numbers["difference"] is not None
        verdict = "refused" if numbers["difference"] is None else "whole model" if whole else "exact"
        if numbers["difference"]:
            verdict = f"differs by {numbers['difference']:g}"
        rows.append([name, verdict, "" if numbers["said"] else f"{numbers['freed']:.0%}"])
    return _table(["class", "outcome", "freed"], rows)


def _said(tried: dict[str, Any], not_tried: dict[str, str]) -> str:
    said = {name: n["said"] for name, n in tried.items() if n["said"]}
    said |= {name: f"not tried, because {why}." for name, why in not_tried.items()}
    return "\n".join(f"- {name}: {sentence}" for name, sentence in sorted(said.items()))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size >= 0.005 * 2**30 or size == 0 else "<0.01"
