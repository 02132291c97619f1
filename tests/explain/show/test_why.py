"""The account of one value."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import fusion_compile as fc
from fusion_compile.passes import Finding


def test_why_tells_of_a_node_where_it_is_and_what_it_is_computed_from() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    explanation = fc.explain(model, (torch.randn(3, 4),), run=False)
    told = explanation.why("addmm_1")
    assert "aten.addmm.default in graph 0, forward, 2" in told
    assert "from gelu (1) <- addmm (0) <- t (0) <- 0.weight" in told
    assert explanation.why("2") == told  # by its module
    assert "read by t" in explanation.why("0.weight")
    with pytest.raises(KeyError, match="the nearest names are"):
        explanation.why("adm_1")


def test_a_finding_stays_with_its_node_when_others_are_put_before_it(explanation: fc.Explanation) -> None:
    """As the findings of a run are, which are merged after the nodes were linked."""
    (node,) = (n for graph in explanation.graphs for n in graph.nodes if n.op == "aten._linalg_eigh.default")
    (its_own,) = (finding for finding in explanation.findings if finding.kind == "capture_unsafe")
    new = Finding("recompile", "step", "a.py:1", "Why.", "Remedy.")
    more = dataclasses.replace(explanation, findings=(new, *reversed(explanation.findings)))
    for each in (explanation, more):
        assert f"  {its_own}" in each.why(node.name).splitlines() and str(new) not in each.why(node.name)
