"""An explanation as JSON and back, and as text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import fusion_compile as fc
from fusion_compile.explain._facts import CudaGraphs, CudaGraphSkip, Kernel, RuntimeFacts
from fusion_compile.explain._findings import identity


def test_there_and_back_nothing_is_lost(explanation: fc.Explanation, tmp_path: Path) -> None:
    data = explanation.to_json()
    text = json.dumps(data, allow_nan=False)
    assert fc.Explanation.from_json(json.loads(text)) == explanation
    assert explanation.to_json(tmp_path / "e.json") == data
    assert fc.Explanation.from_json(tmp_path / "e.json") == explanation
    assert [p.name for p in tmp_path.iterdir()] == ["e.json"]
    assert explanation.findings and explanation.graphs and explanation.runtime is not None


def test_the_form_is_the_one_that_is_promised(explanation: fc.Explanation) -> None:
    data = explanation.to_json()
    assert (data["schema"], data["version"]) == ("fusion_compile.explanation", 2)
    assert set(data) == {
        "schema", "version", "title", "kind", "environment", "summary", "findings", "sections", "graphs", "passes",
        "runtime", "hoisting", "notes", "peaks",
    }  # fmt: skip
    graph = data["graphs"][0]
    assert set(graph) == {"name", "regions", "edges", "nodes", "memory"}
    assert set(graph["nodes"][0]) == {
        "name", "op", "region", "module", "where", "dtype", "shape", "flops", "bytes_read", "bytes_written",
        "intensity", "microseconds", "launches", "inputs", "binding_time", "finding", "recomputed",
    }  # fmt: skip
    assert set(graph["memory"]) == {"curve", "peak_bytes", "peak_node", "alive_at_peak", "fused_peak_bytes"}
    assert set(data["findings"][0]) == {"id", "kind", "op", "where", "why", "remedy", "severity"}
    assert len(graph["memory"]["curve"]) == len(graph["nodes"])
    assert all(math.isfinite(n["microseconds"]) for g in data["graphs"] for n in g["nodes"])


def test_what_was_seen_at_run_time_comes_back_as_what_it_was(explanation: fc.Explanation) -> None:
    import dataclasses

    seen = RuntimeFacts(
        kernels=(Kernel("k", ("mul",), ("a.py:1",), "void k();"),),
        cudagraphs=CudaGraphs(1, 2, (CudaGraphSkip("mutated", "a.py:2"),)),
    )
    told = dataclasses.replace(explanation, runtime=seen)
    assert fc.Explanation.from_json(told.to_json()).runtime == seen


def test_a_finding_is_linked_to_the_node_that_it_is_about(explanation: fc.Explanation) -> None:
    by_identity = {identity(finding): finding for finding in explanation.findings}
    linked = {n.op: by_identity[n.finding] for g in explanation.graphs for n in g.nodes if n.finding is not None}
    assert linked["aten._linalg_eigh.default"].kind == "capture_unsafe"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"a": 1}, "is no explanation"),
        ({"schema": "fusion_compile.explanation", "version": 9}, "version 9 and this fusion_compile reads version 2"),
        ({"schema": "fusion_compile.explanation", "version": 2}, "parts missing"),
        ({"schema": "fusion_compile.explanation", "version": 2, "title": "", "kind": "", "environment": 3}, "missing"),
    ],
)
def test_other_json_is_refused(data: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        fc.Explanation.from_json(data)
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"x\.json.*" + said):
        fc.Explanation.from_json(tmp_path / "x.json")
