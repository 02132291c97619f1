"""Explain a training step: banks, routes, hyperparameters, and the captured graphs by region."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusion_compile._program.program import Program, recomputed_region, region_of
from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.routing import Route
from fusion_compile._types import Tensors
from fusion_compile.explain._environment import environment
from fusion_compile.explain._explanation import Explanation
from fusion_compile.explain._facts import GraphFacts, Section, section
from fusion_compile.explain._findings import deduplicate
from fusion_compile.explain._graph.graph_facts import graph_facts
from fusion_compile.explain._graph.roofline import Roofline, roofline
from fusion_compile.explain._graph.static_findings import find_in_program
from fusion_compile.explain._show.summary import summarize
from fusion_compile.explain._subjects.step_memory import compiled_peaks, peak_section
from fusion_compile.passes import Finding

_MOST_OPERATORS = 6
_WAYS = {"read": "reading", "run": "running"}


@dataclass(frozen=True)
class StepParts:
    """What an explanation of a training step is made from.

    `banks`: the module's, empty once the step was released. `state`: flat. `unused`: parameters that the loss never
    reads. `because`: why the step was captured by running, where nobody asked for it. `choices`: what the optimizer
    chose by the device, in sentences. `communication`: collectives of the last program, as ``(what, how many, bytes
    that a rank sends)``.
    """

    model: nn.Module
    layout: Layout
    routes: Sequence[Route]
    banks: Tensors
    state: Tensors
    hyperparameters: Mapping[str, Any]
    programs: Sequence[Program]
    periodic_programs: Mapping[str, Program]
    unused: Sequence[str]
    because: str = ""
    choices: Sequence[str] = ()
    communication: Sequence[tuple[str, int, int]] = ()


def explain_step(title: str, parts: StepParts, *, device: str | None = None) -> Explanation:
    """Build tables of banks, routes and numbers, the nodes of every captured graph with their costs, and findings.

    torch's random numbers stand afterwards where they stood, so that looking at a step does not change its training.
    `device`: whose peaks the times assume, see `ROOFLINES`.
    """
    devices = range(torch.cuda.device_count()) if parts.layout.device.type == "cuda" else ()
    with torch.random.fork_rng(devices):
        return _explain_step(title, parts, device)


def _explain_step(title: str, parts: StepParts, device: str | None) -> Explanation:
    layout, programs, periodic_programs = parts.layout, parts.programs, parts.periodic_programs
    line = roofline(device, layout.device)
    sections = [
        _banks(layout, parts.state),
        _state(layout, parts.state),
        _routes(parts.routes),
        _numbers(parts.hyperparameters),
    ]
    if parts.communication:
        columns = ("communication of the last program", "collectives", "bytes that a rank sends")
        sections.append(section("Ranks", columns, list(parts.communication)))
    headings = {f"Program {i}": p for i, p in enumerate(programs)}
    headings |= {f"Now and then, without a CUDA graph: {n}": p for n, p in periodic_programs.items()}
    sections += [_graph(heading, program) for heading, program in headings.items() if not program.not_in_aten]
    sections += [_regions(heading, program) for heading, program in headings.items() if program.compiled]
    named = {f"step {i}": p for i, p in enumerate(programs)} | dict(periodic_programs)
    peaks = compiled_peaks(named, [*parts.state.values(), *parts.model.parameters(), *parts.model.buffers()])
    sections += map(peak_section, peaks)
    found = [*_rebound(layout, parts.banks, parts.model), *(f for p in named.values() for f in find_in_program(p))]
    findings = deduplicate(found)
    graphs = [_facts(name, program, line, findings) for name, program in named.items() if not program.not_in_aten]
    notes = [f"the step was captured by running it, because {parts.because}"] if parts.because else []
    notes += dict.fromkeys(parts.choices)
    notes += [f"the loss never reads {name}; its gradient counts as zero." for name in parts.unused]
    notes += [
        f"{name} has no costs here, because it cannot be written out in ATen's operators ({p.not_in_aten})."
        for name, p in named.items()
        if p.not_in_aten
    ]
    if not programs:
        notes.append("nothing was captured yet: call the step once (with mode='eager' nothing ever is).")
    return Explanation(
        title,
        "training_step",
        environment(layout.device.type, str(line)),
        summary=summarize(findings, graphs, captured=bool(programs)),
        findings=findings,
        sections=tuple(sections),
        graphs=tuple(graphs),
        notes=tuple(notes),
        peaks=tuple(peaks),
    )


def _facts(name: str, program: Program, line: Roofline, findings: Sequence[Finding]) -> GraphFacts:
    return graph_facts(name, program.aten, line, region=region_of, input_names=program.input_names, findings=findings)


def _rebound(layout: Layout, banks: Tensors, model: nn.Module) -> list[Finding]:
    """Findings for parameters that no longer lie in their place in the banks."""
    if not banks:  # released: they need not
        return []
    now = dict(model.named_parameters())
    return [
        Finding(
            "rebound_parameter",
            name,
            "",
            "It was given other memory (.data = …, .to(), .half(), or a new Parameter) after compile_training_step(); "
            "the program still updates the old one, and the next step refuses to run.",
            "Copy into it (parameter.copy_), or compile the step again.",
        )
        for name, place in layout.views(banks).items()
        if name not in now or (not place.is_meta and now[name].data_ptr() != place.data_ptr())  # meta: on other ranks
    ]


def _banks(layout: Layout, state: Tensors) -> Section:
    rows = []
    for bank in layout.banks:
        held = sum(t.nbytes for key, t in state.items() if layout.bank_of(key) == bank.key)
        entries = sum(place.numel for place in bank.places)
        rows.append((bank.key, "×".join(map(str, bank.shape)), len(bank.places), entries, f"{held / 2**20:.2f}"))
    return section("Banks", ("bank", "shape", "parameters", "entries", "MiB with state"), rows)


def _state(layout: Layout, state: Tensors) -> Section:
    """What is kept for every parameter, field by field, and in what. Names are those of the state with the codec behind
    them: ``mu_int8``, ``mu_int8_scale``."""
    entries = sum(place.numel for bank in layout.banks for place in bank.places)
    held: dict[tuple[str, str], int] = {}
    for key, tensor in state.items():
        bank = layout.bank_of(key)
        if bank is not None:
            section_, rest = keys.split(key.removesuffix(f"/{bank}"))
            field = "weights" if section_ == keys.PARAMS else rest.rpartition("/")[2] or section_
            at = (field, str(tensor.dtype).removeprefix("torch."))
            held[at] = held.get(at, 0) + tensor.nbytes
    rows = [(field, dtype, f"{size / 2**20:.2f}", f"{size / entries:.3f}") for (field, dtype), size in held.items()]
    return section("State by field", ("field", "kept as", "MiB", "bytes a parameter"), rows)


def _routes(routes: Sequence[Route]) -> Section:
    """One row for all parameters that differ only in a layer's number. Several groups make a column."""
    grouped = len({r.group for r in routes}) > 1
    repeats = Counter(
        (
            re.sub(r"(?<=\.)\d+(?=\.)", "*", r.name, count=1),
            "×".join(map(str, r.shape)) or "0-D",
            r.role,
            *((r.group,) if grouped else ()),
            r.reason,
        )
        for r in routes
    )
    rows = [(name, count, *rest) for (name, *rest), count in repeats.items()]
    columns = ("parameter", "how many", "shape", "role", *(("group",) if grouped else ()), "why")
    return section("Routing", columns, rows)


def _numbers(hyperparameters: Mapping[str, Any]) -> Section:
    return section("Hyperparameters (live)", ("name", "value"), list(hyperparameters.items()))


def _graph(what: str, program: Program) -> Section:
    counts = program.operators()
    rows = []
    for region in counts:
        most = ", ".join(f"{name} {n}" for name, n in counts[region].most_common(_MOST_OPERATORS))
        rows.append((region, counts[region].total(), most))
    recomputed = sum(recomputed_region(n) > 0 for n in program.aten.graph.nodes)
    heading = f"{what}: one graph, {program.nodes} calls as captured by {_WAYS[program.captured_by]}"
    if recomputed:
        heading += f", {recomputed} of them recompute {program.checkpoints} checkpointed regions"
    return section(heading, ("region", "ATen calls", "most frequent"), rows)


def _regions(what: str, program: Program) -> Section:
    """The regions that a program was compiled in, blocks first."""
    regions = sorted(program.compiled, key=lambda region: not region.repeats)
    rows = [(r.name, "a block" if r.repeats else "the rest", ", ".join(r.parts), r.called, r.kernels) for r in regions]
    known = sum(r.is_shared for r in regions)
    called, calls = sum(r.called for r in regions), sum(r.called * r.kernels for r in regions)
    compiled = sum(r.kernels for r in regions)
    once = f"each compiled once, {known} of them for an earlier program" if known else "each compiled once"
    heading = f"{what}: {len(regions)} regions, {once}, called {called} times in a step; "
    heading += f"{compiled} operators compiled for {calls}"
    return section(heading, ("region", "what", "of", "calls in a step", "operators that compute"), rows)
