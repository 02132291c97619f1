"""The table of a graph: modules, source lines, regions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusion_compile as fc
from fusion_compile.explain._findings import identity
from fusion_compile.explain._graph.graph_facts import graph_facts
from fusion_compile.explain._graph.roofline import ROOFLINES
from fusion_compile.passes import Finding
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


def test_an_operator_on_the_cpu_has_the_time_of_a_cpu() -> None:
    """Of a program that runs on a GPU, and of one whose tensor would be on the CPU there."""

    def program(x: Tensor) -> Tensor:
        table = torch.linspace(0, 1, 4096).sin()
        return x + table.to(x.device)

    with FakeTensorMode():
        on_gpu = make_fx(program)(torch.empty(4096, device="cuda"))
        on_cpu = make_fx(program)(torch.empty(4096))
    facts = graph_facts("", on_gpu, ROOFLINES["h100"], region=lambda _: "forward")
    times = {node.name: node.microseconds for node in facts.nodes}
    moved = {node.name: node.bytes_read + node.bytes_written for node in facts.nodes}
    assert times["sin"] == pytest.approx(moved["sin"] / ROOFLINES["cpu"].bandwidth * 1e6)
    assert times["add"] == pytest.approx(moved["add"] / ROOFLINES["h100"].bandwidth * 1e6)

    finding = Finding("cpu_tensor", "linspace", f"{__file__}:1", "Why.", "Remedy.")
    for node in on_cpu.graph.nodes:
        node.meta["stack_trace"] = f'  File "{__file__}", line 1, in program\n    …' if node.name == "linspace" else ""
    facts = graph_facts("", on_cpu, ROOFLINES["h100"], region=lambda _: "forward", findings=[finding])
    made = next(node for node in facts.nodes if node.name == "linspace")
    assert made.finding == identity(finding)
    assert made.microseconds == pytest.approx(made.bytes_written / ROOFLINES["cpu"].bandwidth * 1e6)
    plain = graph_facts("", on_cpu, ROOFLINES["cpu"], region=lambda _: "forward", findings=[finding])
    assert next(node for node in plain.nodes if node.name == "linspace").microseconds == made.microseconds
