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
    whole: Status = "plain" if runtime is not None and runtime.graph_breaks else "good"
    lines = [
        SummaryLine("captured", _graphs(len(graphs)) if captured else "nothing yet", whole if captured else "bad"),
        SummaryLine("findings", _counted(findings), "bad" if worst else "plain" if findings else "good"),
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
    costs = sorted((n for g in counted for n in g.nodes), key=lambda n: -n.microseconds)[:_MOST_EXPENSIVE]
    lines += [SummaryLine(f"most expensive {i}", _described(n)) for i, n in enumerate(costs, 1) if n.microseconds]
    return tuple(lines)


def _peak(memory: Memory) -> str:
    whole, fused = (f"{size / 2**20:.4g} MiB" for size in (memory.peak_bytes, memory.fused_peak_bytes))
    return f"{whole} operator by operator, about {fused} fused"


def _graphs(n: int) -> str:
    return "one graph" if n == 1 else f"{n} graphs"


def _events(runtime: RuntimeFacts) -> list[SummaryLine]:
    graphs = runtime.cudagraphs
    counts = {
        "graph breaks": len(runtime.graph_breaks),
        "recompiles": len(runtime.recompiles),
        "CUDA-graph skips": len(graphs.skips),
        "CUDA-graph re-records": len(graphs.rerecords),
    }
    return [SummaryLine(label, str(n), "bad" if n else "good") for label, n in counts.items()]


def _counted(findings: Sequence[Finding]) -> str:
    kinds: dict[str, int] = {}
    for finding in findings:
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    return ", ".join(f"{kind} {n}" for kind, n in kinds.items()) or "none"


def _described(node: NodeFacts) -> str:
    place = ", ".join(filter(None, (node.region, node.module, node.where)))
    return f"{node.name} ({node.op}) in {place}: at least {node.microseconds:.3g} µs"
