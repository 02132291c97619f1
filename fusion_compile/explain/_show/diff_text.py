"""The difference of two explanations as text: costs, calls, findings, kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from fusion_compile.explain._comparison import CostDelta, DifferenceFacts
from fusion_compile.explain._facts import Section, section
from fusion_compile.explain._show.text import table

_MOST_ROWS = 40


def write_difference(difference: DifferenceFacts, console: Console) -> None:
    """Write the titles, a table for each kind of change, then findings and kernels."""
    console.print(Text(f"{difference.before} -> {difference.after}", style="bold"))
    if not difference:
        console.print("No difference.")
        return
    for part in _tables(difference):
        console.print()
        console.print(table(part))
    for heading, findings in (("gone", difference.findings_gone), ("new", difference.findings_new)):
        if findings:
            console.print(f"\n{len(findings)} {'finding' if len(findings) == 1 else 'findings'} {heading}:")
            for finding in findings:
                console.print(Text(f"  {finding}"), soft_wrap=True)
    for heading, kernels in (("gone", difference.kernels_gone), ("new", difference.kernels_new)):
        if kernels:
            counted = f"{len(kernels)} {'kernel' if len(kernels) == 1 else 'kernels'}"
            names = ", ".join(kernels[:_MOST_ROWS])
            console.print(Text(f"\n{counted} {heading}: {names}"), soft_wrap=True)


def _tables(difference: DifferenceFacts) -> Iterator[Section]:
    if difference.costs:
        rows = [(c.name, _number(c.before), _number(c.after), _ratio(c)) for c in difference.costs]
        yield section("Costs", ("", "before", "after", "ratio"), rows)
    if difference.regions:
        deltas = [(d.region, d.operator, d.before, d.after, f"{d.after - d.before:+d}") for d in difference.regions]
        heading = "Calls by region and operator"
        yield section(heading, ("region", "operator", "before", "after", "change"), _first(deltas))
    for heading, calls in (("Nodes gone", difference.nodes_gone), ("Nodes new", difference.nodes_new)):
        if calls:
            listed = _first([(call.region, call.fingerprint, count) for call, count in calls])
            yield section(heading, ("region", "operator, line, shape", "how many"), listed)


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:,.4g}"


def _ratio(cost: CostDelta) -> str:
    return f"{cost.after / cost.before:.3f}" if cost.before else "new"


def _first(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    left = len(rows) - _MOST_ROWS
    return rows if left <= 0 else [*rows[:_MOST_ROWS], (f"and {left} more", *[""] * (len(rows[0]) - 1))]
