"""What differs between two explanations: counts of operators, then nodes, findings, costs, kernels."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fusion_compile.explain._facts import GraphFacts, NodeFacts, Section, section
from fusion_compile.explain._show.json_form import plain, write_json
from fusion_compile.explain._show.text import WIDTH, table
from fusion_compile.passes import Finding

if TYPE_CHECKING:
    from fusion_compile.explain._explanation import Explanation

_MOST_ROWS = 40


@dataclass(frozen=True)
class OperatorDelta:
    """How many calls of `operator` a region of the programs has."""

    region: str
    operator: str
    before: int
    after: int


@dataclass(frozen=True)
class NodeDelta:
    """Nodes of one `fingerprint` that only one side has, `count` of them."""

    fingerprint: str
    count: int


@dataclass(frozen=True)
class CostDelta:
    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Difference:
    """From one explanation to another. ``bool(difference)``: whether there is any.

    `regions`: operators whose counts differ. `nodes_gone`, `nodes_new`: by fingerprint, which is the operator, the
    user's source line and the shape, and so survives renumbering. Findings are counted by kind, operator and file: a
    line may have moved, and a second ``.item()`` in a file is new.
    """

    before: str
    after: str
    regions: tuple[OperatorDelta, ...]
    nodes_gone: tuple[NodeDelta, ...]
    nodes_new: tuple[NodeDelta, ...]
    findings_gone: tuple[Finding, ...]
    findings_new: tuple[Finding, ...]
    costs: tuple[CostDelta, ...]
    kernels_gone: tuple[str, ...]
    kernels_new: tuple[str, ...]

    def __bool__(self) -> bool:
        changes = (self.regions, self.nodes_gone, self.nodes_new, self.findings_gone, self.findings_new, self.costs)
        return any((*changes, self.kernels_gone, self.kernels_new))

    def __str__(self) -> str:
        out = StringIO()
        self._write(Console(file=out, width=WIDTH, no_color=True, force_terminal=False, highlight=False))
        return out.getvalue().rstrip()

    def print(self) -> None:
        """Print to standard output, with colours when it is a terminal."""
        self._write(Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """What `json.dumps` takes; with `path` it is also written there."""
        data: dict[str, Any] = plain(self)
        if path is not None:
            write_json(data, path)
        return data

    def _write(self, console: Console) -> None:
        console.print(Text(f"{self.before} -> {self.after}", style="bold"))
        if not self:
            console.print("No difference.")
            return
        for part in self._tables():
            console.print()
            console.print(table(part))
        for heading, findings in (("gone", self.findings_gone), ("new", self.findings_new)):
            if findings:
                console.print(f"\n{len(findings)} {'finding' if len(findings) == 1 else 'findings'} {heading}:")
                for finding in findings:
                    console.print(Text(f"  {finding}"), soft_wrap=True)
        for heading, kernels in (("gone", self.kernels_gone), ("new", self.kernels_new)):
            if kernels:
                counted = f"{len(kernels)} {'kernel' if len(kernels) == 1 else 'kernels'}"
                names = ", ".join(kernels[:_MOST_ROWS])
                console.print(Text(f"\n{counted} {heading}: {names}"), soft_wrap=True)

    def _tables(self) -> Iterator[Section]:
        if self.costs:
            rows = [(c.name, _number(c.before), _number(c.after), _ratio(c)) for c in self.costs]
            yield section("Costs", ("", "before", "after", "ratio"), rows)
        if self.regions:
            deltas = [(d.region, d.operator, d.before, d.after, f"{d.after - d.before:+d}") for d in self.regions]
            heading = "Calls by region and operator"
            yield section(heading, ("region", "operator", "before", "after", "change"), _first(deltas))
        for heading, nodes in (("Nodes gone", self.nodes_gone), ("Nodes new", self.nodes_new)):
            if nodes:
                listed = _first([(n.fingerprint, n.count) for n in nodes])
                yield section(heading, ("operator, line, shape", "how many"), listed)


def compare(before: Explanation, after: Explanation) -> Difference:
    """The `Difference` from `before` to `after`."""
    calls = [Counter((n.region, n.op) for g in e.graphs for n in g.nodes if _is_call(n)) for e in (before, after)]
    nodes = [Counter(fingerprint(n) for g in e.graphs for n in g.nodes if _is_call(n)) for e in (before, after)]
    kernels = [Counter(k.name for k in e.runtime.kernels) if e.runtime else Counter() for e in (before, after)]
    costs = [_costs(e.graphs) | _seen(e) for e in (before, after)]
    return Difference(
        before.title,
        after.title,
        regions=tuple(
            OperatorDelta(*key, calls[0][key], calls[1][key])
            for key in sorted({*calls[0], *calls[1]}, key=lambda k: -abs(calls[1][k] - calls[0][k]))
            if calls[0][key] != calls[1][key]
        ),
        nodes_gone=tuple(NodeDelta(*item) for item in (nodes[0] - nodes[1]).most_common()),
        nodes_new=tuple(NodeDelta(*item) for item in (nodes[1] - nodes[0]).most_common()),
        findings_gone=_only_in(before.findings, after.findings),
        findings_new=_only_in(after.findings, before.findings),
        costs=tuple(
            CostDelta(name, costs[0].get(name, 0.0), costs[1].get(name, 0.0))
            for name in dict.fromkeys((*costs[0], *costs[1]))
            if costs[0].get(name, 0.0) != costs[1].get(name, 0.0)
        ),
        kernels_gone=tuple((kernels[0] - kernels[1]).elements()),
        kernels_new=tuple((kernels[1] - kernels[0]).elements()),
    )


def fingerprint(node: NodeFacts) -> str:
    """Operator, source line and shape."""
    return f"{node.op} {node.where or '?'} {node.dtype}[{', '.join(map(str, node.shape))}]"


def _is_call(node: NodeFacts) -> bool:
    return node.region != "input"


def _only_in(these: tuple[Finding, ...], those: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Findings of `these` that have no counterpart in `those`: one on the same line, or else in the same file."""
    left = Counter((_key(f), f.where) for f in those)
    moved = []
    for finding in these:
        if left[_key(finding), finding.where]:
            left[_key(finding), finding.where] -= 1
        else:
            moved.append(finding)
    elsewhere = Counter(key for key, _ in left.elements())
    only = []
    for finding in moved:
        if elsewhere[_key(finding)]:
            elsewhere[_key(finding)] -= 1
        else:
            only.append(finding)
    return tuple(only)


def _key(finding: Finding) -> tuple[str, str, str]:
    return finding.kind, finding.op, finding.where.rpartition(":")[0]


def _costs(graphs: tuple[GraphFacts, ...]) -> dict[str, float]:
    regions = [r for g in graphs for r in g.regions]
    return {
        "calls": float(sum(r.nodes for r in regions)),
        "kernels, one an operator": float(sum(r.launches for r in regions)),
        "FLOP": float(sum(r.flops for r in regions)),
        "bytes moved": float(sum(r.bytes for r in regions)),
        "roofline µs": sum(r.microseconds for r in regions),
        "peak bytes": float(max((g.memory.peak_bytes for g in graphs), default=0)),
    }


def _seen(explanation: Explanation) -> dict[str, float]:
    seen = explanation.runtime
    if seen is None:
        return {}
    return {
        "graph breaks": float(len(seen.graph_breaks)),
        "recompiles": float(len(seen.recompiles)),
        "CUDA graphs": float(seen.cudagraphs.captures),
        "CUDA-graph skips": float(len(seen.cudagraphs.skips)),
        "CUDA-graph re-records": float(len(seen.cudagraphs.rerecords)),
    }


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:,.4g}"


def _ratio(cost: CostDelta) -> str:
    return f"{cost.after / cost.before:.3f}" if cost.before else "new"


def _first(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    left = len(rows) - _MOST_ROWS
    return rows if left <= 0 else [*rows[:_MOST_ROWS], (f"and {left} more", *[""] * (len(rows[0]) - 1))]
