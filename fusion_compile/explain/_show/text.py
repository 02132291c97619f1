"""An explanation as text, in tables drawn by `rich`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion_compile.explain._facts import ExplanationFacts, GraphFacts, RuntimeFacts, Section, section

_COLOURS = {"error": "red", "warning": "yellow", "note": "dim", "bad": "red", "good": "green", "plain": ""}
_MOST_ALIVE = 5
_MOST_KERNELS = 20
_MOST_LINES = 3
_LONGEST_NAME = 64

WIDTH = 140
"""Width in characters of text that is not written to a terminal."""


def write_text(explanation: ExplanationFacts, console: Console) -> None:
    """Write title, tables, costs, the run, and at the end, where a reader looks first, summary, findings and notes."""
    console.print(Text(explanation.title, style="bold"))
    for part in explanation.sections:
        console.print()
        console.print(table(part))
    for graph in explanation.graphs:
        console.print()
        console.print(table(_costs(graph)))
        console.print(Text(_peak(graph), style="dim"), soft_wrap=True)
    for part in _run_tables(explanation.runtime):
        console.print()
        console.print(table(part))
    if explanation.environment.roofline and explanation.graphs:
        on = explanation.environment.roofline
        on += "" if on.startswith("cpu") else "; of an operator on the CPU, on one CPU core"
        console.print(Text(f"µs: lower bounds on {on}", style="dim"), soft_wrap=True)
    console.print()
    for line in explanation.summary:
        console.print(Text.assemble(f"{line.label}: ", (line.value, _COLOURS[line.status])), soft_wrap=True)
    console.print()
    if explanation.findings:
        count = len(explanation.findings)
        console.print(f"{count} {'finding' if count == 1 else 'findings'}:")
        for finding in explanation.findings:
            console.print(Text(f"  {finding}", style=_COLOURS[finding.severity]), soft_wrap=True)
    elif explanation.graphs:
        console.print("No findings: no host sync, and nothing that a CUDA graph cannot hold.")
    else:
        console.print("No findings, and nothing was captured in which there could be some.")
    for note in explanation.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)


def table(part: Section) -> Table:
    """Draw `part` with its columns of numbers aligned right."""
    drawn = Table(title=part.heading, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(part.columns):
        numeric = bool(part.rows) and all(_is_number(row[i]) for row in part.rows)
        drawn.add_column(column, justify="right" if numeric else "left", no_wrap=i == 0)
    for row in part.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _costs(graph: GraphFacts) -> Section:
    rows = [
        (r.name, r.nodes, r.launches, f"{r.flops / 1e9:.4g}", f"{r.bytes / 2**20:.4g}", f"{r.microseconds:.4g}")
        for r in graph.regions
    ]
    columns = ("region", "calls", "kernels", "GFLOP", "MiB moved", "µs")
    return section(f"Costs of {graph.name}, operator by operator", columns, rows)


def _peak(graph: GraphFacts) -> str:
    held = graph.memory
    if not graph.nodes:
        return "no nodes"
    largest = ", ".join(f"{a.name} {a.bytes / 2**20:.3g}" for a in held.alive_at_peak[:_MOST_ALIVE])
    return (
        f"peak {held.peak_bytes / 2**20:.4g} MiB at {graph.nodes[held.peak_node].name}, fused about "
        f"{held.fused_peak_bytes / 2**20:.4g} MiB; largest then: {largest}"
    )


def _run_tables(runtime: RuntimeFacts | None) -> Iterator[Section]:
    if runtime is None:
        return
    if runtime.phases:
        yield section("Compilation", ("phase", "seconds"), [(p.name, f"{p.seconds:.2f}") for p in runtime.phases])
    if runtime.kernels:
        rows: list[tuple[Any, ...]] = [
            (_shortened(k.name), len(k.nodes), _places(k.where)) for k in runtime.kernels[:_MOST_KERNELS]
        ]
        if left := runtime.kernels[_MOST_KERNELS:]:
            rows.append((f"and {len(left)} more", "", ""))
        yield section("Kernels", ("kernel", "nodes", "where"), rows)
    if runtime.fusion_refusals:
        refused = Counter(r.reason for r in runtime.fusion_refusals)
        yield section("Not fused, with Inductor's reasons", ("reason", "pairs"), refused.most_common())


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _places(lines: Sequence[str]) -> str:
    """Shorten `lines` to the first few, without their folders."""
    first = ", ".join(re.split(r"[/\\]", line)[-1] for line in lines[:_MOST_LINES])
    return first + (", …" if len(lines) > _MOST_LINES else "")


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("%", "").strip().isdigit() or not cell
