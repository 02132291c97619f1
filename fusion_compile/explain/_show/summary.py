"""The summary of an explanation: what was captured, what was found, what costs most."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_compile.explain._facts import GraphFacts, Memory, NodeFacts, RuntimeFacts, Status, SummaryLine
from fusion_compile.passes import Finding

_MOST_EXPENSIVE = 3


def summarize(
    findings: Sequence[Finding],
    graphs: Sequence[GraphFacts],
    runtime: RuntimeFacts | None = None,
    *,
    captured: bool = True,
    together: bool = False,
) -> tuple[SummaryLine, ...]:
    """Summarize `graphs` and their run. The costs are those of one call.

    `together`: a call runs all graphs one after the other, so their costs are summed. Otherwise a call runs one of
    them, and the costs are those of the most expensive one.
    """
    worst = [f for f in findings if f.severity == "error"]
    broken = (together and len(graphs) > 1) or (runtime is not None and bool(runtime.graph_breaks))
    whole: Status = "plain" if broken or not graphs else "good"
    found: Status = "bad" if worst else "plain" if findings or not graphs else "good"
    lines = [
        SummaryLine(
            "captured", _captured(graphs, runtime) if captured else "nothing yet", whole if captured else "bad"
        ),
        SummaryLine("findings", _counted(findings), found),
    ]
    if runtime is not None:
        lines += _events(runtime)
    if not graphs:
        return tuple(lines)
    counted = graphs if together else [max(graphs, key=lambda g: sum(r.microseconds for r in g.regions))]
    regions = [r for g in counted for r in g.regions]
    flops, moved, kernels = (sum(getattr(r, field) for r in regions) for field in ("flops", "bytes", "launches"))
    lines += [
        SummaryLine("arithmetic", f"{flops / 1e9:.3g} GFLOP"),
        SummaryLine("memory traffic", f"{moved / 2**20:.4g} MiB, operator by operator"),
        SummaryLine("kernels", f"{kernels}, run operator by operator"),
        SummaryLine("peak memory", _peak(max((g.memory for g in counted), key=lambda m: m.peak_bytes))),
    ]
    again = [n for g in counted for n in g.nodes if n.recomputed]
    if again:
        parts = len({(g.name, n.recomputed) for g in counted for n in g.nodes if n.recomputed})
        regions_again = f"{parts} checkpointed {'region' if parts == 1 else 'regions'}"
        work = f"{sum(n.launches for n in again)} kernels, {sum(n.flops for n in again) / 1e9:.3g} GFLOP"
        lines.append(SummaryLine("recomputed", f"{work}, in {regions_again}"))
    costs = sorted((n for g in counted for n in g.nodes), key=lambda n: -n.microseconds)[:_MOST_EXPENSIVE]
    lines += [SummaryLine(f"most expensive {i}", _described(n)) for i, n in enumerate(costs, 1) if n.microseconds]
    return tuple(lines)


def _captured(graphs: Sequence[GraphFacts], runtime: RuntimeFacts | None) -> str:
    """How many graphs, and into how many pieces the program falls where Python runs between them."""
    breaks = 0 if runtime is None else len(runtime.graph_breaks)
    if not breaks:
        return _graphs(len(graphs))
    at = "a graph break" if breaks == 1 else f"{breaks} graph breaks"
    return f"{breaks + 1} pieces, cut at {at}; {_graphs(len(graphs))} in them"


def _peak(memory: Memory) -> str:
    whole, fused = (f"{size / 2**20:.4g} MiB" for size in (memory.peak_bytes, memory.fused_peak_bytes))
    return f"{whole} operator by operator, about {fused} fused"


def _graphs(n: int) -> str:
    return "one graph" if n == 1 else f"{n} graphs"


def _events(runtime: RuntimeFacts) -> list[SummaryLine]:
    graphs = runtime.cudagraphs
    compiled = bool(runtime.phases)
    return [
        _event("graph breaks", len(runtime.graph_breaks), watched=compiled),
        _event("recompiles", len(runtime.recompiles), watched=compiled),
        _event("CUDA-graph skips", len(graphs.skips), watched=graphs.captures > 0),
        _event("CUDA-graph re-records", len(graphs.rerecords), watched=graphs.captures > 0),
    ]


def _event(label: str, count: int, *, watched: bool) -> SummaryLine:
    """`watched`: whether it could have happened. Where nothing was compiled or recorded, 0 is no good news."""
    if count:
        return SummaryLine(label, str(count), "bad")
    return SummaryLine(label, "0", "good") if watched else SummaryLine(label, "not watched")


def _counted(findings: Sequence[Finding]) -> str:
    kinds: dict[str, int] = {}
    for finding in findings:
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    return ", ".join(f"{kind} {n}" for kind, n in kinds.items()) or "none"


def _described(node: NodeFacts) -> str:
    place = ", ".join(filter(None, (node.region, node.module, node.where)))
    return f"{node.name} ({node.op}) in {place}: at least {node.microseconds:.3g} µs"
