"""The difference of two explanations as plain data. Text and HTML show the same one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fusion_compile.explain._facts import INPUT, ExplanationFacts, GraphFacts, NodeFacts, RuntimeFacts
from fusion_compile.passes import Finding

_SAME_TIME = 1e-3
"""Relative change of a roofline time below which it counts as unchanged: sums differ by their order."""
_PHASE = "phase: "


@dataclass(frozen=True)
class OperatorDelta:
    """Calls of `operator` in one region: their number and their roofline time in µs, before and after."""

    region: str
    operator: str
    before: int
    after: int
    microseconds_before: float
    microseconds_after: float


@dataclass(frozen=True)
class Call:
    """What makes two calls the same in both explanations: operator, region, type of the result and source line.

    Names and positions in the graph do not count, because they change with every renumbering.
    """

    region: str
    operator: str
    dtype: str
    shape: tuple[int | str, ...]
    where: str

    @property
    def fingerprint(self) -> str:
        """Operator, source line and type, as one text."""
        return f"{self.operator} {self.where or '?'} {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class CallDelta:
    """A call that one side has more often. `microseconds`: change of its roofline time."""

    call: Call
    before: int
    after: int
    microseconds: float


@dataclass(frozen=True)
class CostDelta:
    """A sum over the whole program, before and after."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class RuntimeDelta:
    """A count, or a duration if `seconds`, of running both programs; None for a side that was not run."""

    label: str
    before: float | None
    after: float | None
    seconds: bool


@dataclass(frozen=True)
class DifferenceFacts:
    """Everything that differs between two explanations. `Difference` adds the methods that show it.

    `before`, `after`: the titles. `operators`: those whose count or time changed. `calls`: those that one side has more
    often. Findings are the same if kind, operator and line are, or else kind, operator and file: an edit above moves a
    line. `runtime` also lists what did not change.
    """

    before: str
    after: str
    operators: tuple[OperatorDelta, ...]
    calls: tuple[CallDelta, ...]
    findings_gone: tuple[Finding, ...]
    findings_new: tuple[Finding, ...]
    findings_same: tuple[Finding, ...]
    costs: tuple[CostDelta, ...]
    kernels_gone: tuple[str, ...]
    kernels_new: tuple[str, ...]
    runtime: tuple[RuntimeDelta, ...]

    @property
    def regions(self) -> tuple[OperatorDelta, ...]:
        """Operators of a region whose number of calls changed, the largest change first."""
        changed = [delta for delta in self.operators if delta.before != delta.after]
        return tuple(sorted(changed, key=lambda delta: -abs(delta.after - delta.before)))

    @property
    def nodes_gone(self) -> tuple[tuple[Call, int], ...]:
        """Calls that there are fewer of, each with how many are gone."""
        return tuple((delta.call, delta.before - delta.after) for delta in self.calls if delta.before > delta.after)

    @property
    def nodes_new(self) -> tuple[tuple[Call, int], ...]:
        """Calls that there are more of, each with how many are new."""
        return tuple((delta.call, delta.after - delta.before) for delta in self.calls if delta.after > delta.before)

    def __bool__(self) -> bool:
        findings = self.findings_gone or self.findings_new
        return bool(self.regions or self.calls or findings or self.costs or self.kernels_gone or self.kernels_new)


def compare(before: ExplanationFacts, after: ExplanationFacts) -> DifferenceFacts:
    """Compare two explanations; count the calls of all graphs of each."""
    gone, new, same = _findings(before.findings, after.findings)
    kernels = [Counter(k.name for k in side.runtime.kernels) if side.runtime else Counter() for side in (before, after)]
    return DifferenceFacts(
        before.title,
        after.title,
        operators=_operators(before.graphs, after.graphs),
        calls=_calls(before.graphs, after.graphs),
        findings_gone=gone,
        findings_new=new,
        findings_same=same,
        costs=_costs(before, after),
        kernels_gone=tuple((kernels[0] - kernels[1]).elements()),
        kernels_new=tuple((kernels[1] - kernels[0]).elements()),
        runtime=_runtime(before.runtime, after.runtime),
    )


def _each_call(graphs: tuple[GraphFacts, ...]) -> Iterator[NodeFacts]:
    return (node for graph in graphs for node in graph.nodes if node.region != INPUT)


def _operators(before: tuple[GraphFacts, ...], after: tuple[GraphFacts, ...]) -> tuple[OperatorDelta, ...]:
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for side, graphs in enumerate((before, after)):
        for node in _each_call(graphs):
            counts[node.region, node.op][side] += 1
            times[node.region, node.op][side] += node.microseconds
    deltas = [OperatorDelta(*key, *counts[key], *times[key]) for key in counts]
    changed = [d for d in deltas if d.before != d.after or _time_changed(d)]
    return tuple(sorted(changed, key=_by_change_of_time))


def _time_changed(delta: OperatorDelta) -> bool:
    one, other = delta.microseconds_before, delta.microseconds_after
    return abs(one - other) > _SAME_TIME * max(one, other)


def _by_change_of_time(delta: OperatorDelta) -> tuple[float, int, str, str]:
    change = abs(delta.microseconds_after - delta.microseconds_before)
    return -change, -abs(delta.after - delta.before), delta.operator, delta.region


def _calls(before: tuple[GraphFacts, ...], after: tuple[GraphFacts, ...]) -> tuple[CallDelta, ...]:
    counts: dict[Call, list[int]] = defaultdict(lambda: [0, 0])
    times: dict[Call, float] = defaultdict(float)
    for side, graphs in enumerate((before, after)):
        for node in _each_call(graphs):
            call = Call(node.region, node.op, node.dtype, node.shape, node.where)
            counts[call][side] += 1
            times[call] += node.microseconds if side else -node.microseconds
    deltas = [CallDelta(call, one, other, times[call]) for call, (one, other) in counts.items() if one != other]
    return tuple(sorted(deltas, key=lambda delta: (-abs(delta.microseconds), delta.call.fingerprint)))


def _findings(
    before: tuple[Finding, ...], after: tuple[Finding, ...]
) -> tuple[tuple[Finding, ...], tuple[Finding, ...], tuple[Finding, ...]]:
    """Return the findings that are gone, new and the same. Pair them by line first, then by file."""
    gone, new = before, after
    for place in (_line, _file):
        gone, new = _unpaired(gone, new, place), _unpaired(new, gone, place)
    return gone, new, _unpaired(after, new, _line)


def _line(finding: Finding) -> str:
    return finding.where


def _file(finding: Finding) -> str:
    return finding.where.rpartition(":")[0]


def _unpaired(
    findings: tuple[Finding, ...], others: tuple[Finding, ...], place: Callable[[Finding], str]
) -> tuple[Finding, ...]:
    """Remove one of `findings` for each of `others` of the same kind, operator and place; return the rest."""
    left = Counter((other.kind, other.op, place(other)) for other in others)
    rest = []
    for finding in findings:
        key = finding.kind, finding.op, place(finding)
        if left[key] > 0:
            left[key] -= 1
        else:
            rest.append(finding)
    return tuple(rest)


def _costs(before: ExplanationFacts, after: ExplanationFacts) -> tuple[CostDelta, ...]:
    one, other = (_sums(side.graphs) | (_events(side.runtime) if side.runtime else {}) for side in (before, after))
    deltas = [CostDelta(name, one.get(name, 0.0), other.get(name, 0.0)) for name in dict.fromkeys((*one, *other))]
    return tuple(delta for delta in deltas if delta.before != delta.after)


def _sums(graphs: tuple[GraphFacts, ...]) -> dict[str, float]:
    regions = [region for graph in graphs for region in graph.regions]
    return {
        "calls": float(sum(r.nodes for r in regions)),
        "kernels, one per operator": float(sum(r.launches for r in regions)),
        "FLOP": float(sum(r.flops for r in regions)),
        "bytes moved": float(sum(r.bytes for r in regions)),
        "roofline µs": sum(r.microseconds for r in regions),
        "peak bytes": float(max((g.memory.peak_bytes for g in graphs), default=0)),
    }


def _events(runtime: RuntimeFacts) -> dict[str, float]:
    """The counts of a run that cost time when they grow."""
    return {
        "graph breaks": float(len(runtime.graph_breaks)),
        "recompiles": float(len(runtime.recompiles)),
        "CUDA graphs": float(runtime.cudagraphs.captures),
        "CUDA-graph skips": float(len(runtime.cudagraphs.skips)),
        "CUDA-graph re-records": float(len(runtime.cudagraphs.rerecords)),
    }


def _runtime(before: RuntimeFacts | None, after: RuntimeFacts | None) -> tuple[RuntimeDelta, ...]:
    one, other = (_counts_and_seconds(side) if side else {} for side in (before, after))
    return tuple(
        RuntimeDelta(label, one.get(label), other.get(label), seconds=label.startswith(_PHASE))
        for label in dict.fromkeys((*one, *other))
    )


def _counts_and_seconds(runtime: RuntimeFacts) -> dict[str, float]:
    counts = _events(runtime) | {
        "CUDA-graph partitions": float(runtime.cudagraphs.partitions),
        "guards": float(len(runtime.guards)),
        "kernels": float(len(runtime.kernels)),
        "fusion refusals": float(len(runtime.fusion_refusals)),
        "cache hits": float(runtime.cache.hits),
        "cache misses": float(runtime.cache.misses),
        "cache bypasses": float(runtime.cache.bypasses),
    }
    return counts | {f"{_PHASE}{phase.name}": phase.seconds for phase in runtime.phases}
