"""The explanation of a training step: banks, routes, hyperparameters, and the captured graph by region."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_compile._program import REGIONS, Program
from fusion_compile._routing import Route
from fusion_compile._state import Layout
from fusion_compile._types import Tensors
from fusion_compile.explain._explanation import Explanation, Section, section

_MOST_OPERATORS = 6


def explain_step(
    *,
    title: str,
    routes: Sequence[Route],
    layout: Layout,
    state: Tensors,
    hyperparameters: Mapping[str, Any],
    programs: Sequence[Program],
    periodic_programs: Mapping[str, Program],
    unused: Sequence[str],
) -> Explanation:
    """Tables of what went where, and findings over every captured graph."""
    sections = [_banks(layout, state), _routes(routes), _numbers(hyperparameters)]
    sections += [_graph(f"Program {i}", program) for i, program in enumerate(programs)]
    sections += [_graph(f"Now and then, without a CUDA graph: {n}", p) for n, p in periodic_programs.items()]
    everything = (*programs, *periodic_programs.values())
    findings = tuple(dict.fromkeys(f for p in everything for f in p.findings(thorough=True)))
    notes = [f"the loss never reads {name}; its gradient counts as zero." for name in unused]
    if not programs:
        notes.append("nothing was captured yet: call the step once (with mode='eager' nothing ever is).")
    return Explanation(title, tuple(sections), findings, tuple(notes))


def _banks(layout: Layout, state: Tensors) -> Section:
    rows = []
    for bank in layout.banks:
        held = sum(t.nbytes for path, t in state.items() if path.endswith(f"/{bank.key}"))
        entries = sum(place.numel for place in bank.places)
        rows.append((bank.key, "×".join(map(str, bank.shape)), len(bank.places), entries, f"{held / 2**20:.2f}"))
    return section("Banks", ("bank", "shape", "parameters", "entries", "MiB with state"), rows)


def _routes(routes: Sequence[Route]) -> Section:
    """One row for all parameters that differ only in a layer's number."""
    repeats = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", r.name, count=1), "×".join(map(str, r.shape)) or "0-D", r.role, r.reason)
        for r in routes
    )
    rows = [(name, count, *rest) for (name, *rest), count in repeats.items()]
    return section("Routing", ("parameter", "how many", "shape", "role", "why"), rows)


def _numbers(hyperparameters: Mapping[str, Any]) -> Section:
    return section("Hyperparameters (live)", ("name", "value"), list(hyperparameters.items()))


def _graph(what: str, program: Program) -> Section:
    counts = program.operators()
    rows = []
    for region in REGIONS:
        most = ", ".join(f"{name} {n}" for name, n in counts[region].most_common(_MOST_OPERATORS))
        rows.append((region, counts[region].total(), most))
    heading = f"{what}: one graph, {program.nodes} calls as captured"
    return section(heading, ("region", "ATen calls", "most frequent"), rows)
