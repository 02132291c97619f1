"""The table of a graph: modules, source lines, regions."""

from __future__ import annotations

import pytest

import fusion_compile as fc
from tests.explain.small_step import small_step


@pytest.fixture
def dit_step() -> fc.TrainingStep:
    return small_step()


def test_nodes_of_forward_and_backward_know_their_module_and_line(dit_step: fc.TrainingStep) -> None:
    (graph,) = dit_step.explain().graphs
    products = [n for n in graph.nodes if n.module == "blocks.1.attn.qkv" and n.flops]
    assert {n.region for n in products} == {"forward", "backward"}
    assert len(products) == 3
    assert all("dit.py:" in n.where for n in products)
    assert len({n.where for n in products}) == 1  # the gradient's line is the forward's
    names = {n.name for n in graph.nodes if n.region == "input"}
    assert {"state/counts/step", "batch/0", "model/pos_embed"} <= names


def test_regions_add_up_and_bytes_cross_between_them(dit_step: fc.TrainingStep) -> None:
    (graph,) = dit_step.explain(device="h100").graphs
    assert {r.name for r in graph.regions} == {"forward", "backward", "optimizer", "state"}
    for region in graph.regions:
        own = [n for n in graph.nodes if n.region == region.name]
        assert region.flops == sum(n.flops for n in own)
        assert region.bytes == sum(n.bytes_read + n.bytes_written for n in own)
    assert all(0 <= i < at for at, n in enumerate(graph.nodes) for i in n.inputs)
    crossing = {(a, b): size for a, b, size in graph.edges}
    assert crossing["forward", "backward"] > 0
    assert ("optimizer", "forward") not in crossing
