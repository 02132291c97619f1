"""The first lines of an explanation."""

from __future__ import annotations

from dataclasses import replace

from fusion_compile.explain._facts import (
    CudaGraphs,
    CudaGraphSkip,
    GraphBreak,
    GraphFacts,
    Memory,
    NodeFacts,
    Phase,
    RegionFacts,
    RuntimeFacts,
    SummaryLine,
)
from fusion_compile.explain._show.summary import summarize
from fusion_compile.passes import Finding


def graph(name: str, microseconds: float, peak: int) -> GraphFacts:
    node = NodeFacts(
        "mm", "aten.mm.default", "forward", "0", "a.py:1", "float32", (2,), 10, 4, 4, 1.25, microseconds, 1, ()
    )
    region = RegionFacts("forward", 1, 1, 10**9, 2**20, microseconds)
    return GraphFacts(name, (region,), (), (node,), Memory((peak,), peak, 0, (), peak))


def values(lines: tuple[SummaryLine, ...]) -> dict[str, tuple[str, str]]:
    return {line.label: (line.value, line.status) for line in lines}


def test_costs_are_summed_if_a_call_runs_all_graphs_and_else_those_of_the_most_expensive() -> None:
    graphs = [graph("a", 1.0, 2**20), graph("b", 2.0, 2**21)]
    one = values(summarize([], graphs))
    assert one["captured"] == ("2 graphs", "good") and one["findings"] == ("none", "good")
    assert one["arithmetic"] == ("1 GFLOP", "plain") and one["kernels"] == ("1, run operator by operator", "plain")
    assert one["peak memory"] == ("2 MiB operator by operator, about 2 MiB fused", "plain")
    assert one["most expensive 1"][0] == "mm (aten.mm.default) in forward, 0, a.py:1: at least 2 µs"
    assert "most expensive 2" not in one
    both = values(summarize([], graphs, together=True))
    assert both["arithmetic"] == ("2 GFLOP", "plain") and both["memory traffic"][0] == "2 MiB, operator by operator"
    assert both["captured"] == ("2 graphs", "plain")  # a call that needs two has a break between them
    assert both["most expensive 2"][0].endswith("at least 1 µs")


def test_findings_are_counted_by_kind_and_bad_only_with_an_error() -> None:
    warning = Finding("rerecord", "CUDA graph", "", "Why.", "Remedy.", "warning")
    error = Finding("recompile", "x", "", "Why.", "Remedy.")
    assert values(summarize([warning], []))["findings"] == ("rerecord 1", "plain")
    assert values(summarize([error, warning, error], []))["findings"] == ("recompile 2, rerecord 1", "bad")


COMPILED = (Phase("Dynamo: from Python to a graph", 1.0),)


def test_events_of_a_run_are_good_if_there_are_none() -> None:
    runtime = RuntimeFacts(graph_breaks=(GraphBreak("r", ""),), cudagraphs=CudaGraphs(), phases=COMPILED)
    lines = values(summarize([], [graph("a", 1.0, 0)], runtime))
    assert lines["captured"] == ("2 pieces, cut at a graph break; one graph in them", "plain")
    assert lines["graph breaks"] == ("1", "bad") and lines["recompiles"] == ("0", "good")


def test_what_was_not_watched_is_not_good() -> None:
    """Where nothing was compiled there can be no break, and without a recording no skip."""
    labels = ("graph breaks", "recompiles", "CUDA-graph skips", "CUDA-graph re-records")
    idle = values(summarize([], [graph("a", 1.0, 0)], RuntimeFacts()))
    assert [idle[label] for label in labels] == [("not watched", "plain")] * 4
    on_cpu = values(summarize([], [graph("a", 1.0, 0)], RuntimeFacts(phases=COMPILED)))
    assert [on_cpu[label] for label in labels] == [("0", "good")] * 2 + [("not watched", "plain")] * 2
    recorded = RuntimeFacts(phases=COMPILED, cudagraphs=CudaGraphs(captures=1))
    assert [values(summarize([], [], recorded))[label] for label in labels] == [("0", "good")] * 4
    skipped = RuntimeFacts(phases=COMPILED, cudagraphs=CudaGraphs(skips=(CudaGraphSkip("why", ""),)))
    assert values(summarize([], [], skipped))["CUDA-graph skips"] == ("1", "bad")


def test_no_findings_are_no_good_news_where_nothing_was_captured() -> None:
    assert values(summarize([], []))["findings"] == ("none", "plain")


def test_what_checkpointing_computes_again_is_told() -> None:
    once = graph("a", 1.0, 0)
    assert "recomputed" not in values(summarize([], [once]))
    again = replace(once, nodes=tuple(replace(once.nodes[0], recomputed=i) for i in (1, 1, 2)))
    lines = values(summarize([], [again]))
    assert lines["recomputed"] == ("3 kernels, 3e-08 GFLOP, in 2 checkpointed regions", "plain")


def test_nothing_captured_is_bad() -> None:
    assert summarize([], [], captured=False)[0] == SummaryLine("captured", "nothing yet", "bad")
