"""Graphs that were captured elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fusion_compile as fc
from fusion_compile._compat import fake_mode
from fusion_compile.explain._facts import GraphFacts


def flops(graph: GraphFacts, *regions: str) -> int:
    return sum(r.flops for r in graph.regions if r.name in regions or not regions)


def test_an_exported_program_and_a_graph_module_are_explained_without_running() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    exported = torch.export.export(model, (torch.randn(3, 4),), strict=False)
    traced = fx.symbolic_trace(model)
    for explanation in (fc.explain(exported), fc.explain(traced, (torch.randn(3, 4),))):
        (graph,) = explanation.graphs
        assert flops(graph) == 2 * 3 * (4 * 8 + 8 * 2)
        assert {"0.weight", "2.bias"} <= {n.name for n in graph.nodes}
        assert {n.module for n in graph.nodes if n.flops} == {"0", "2"}
        assert explanation.runtime is None
    with pytest.raises(ValueError, match="takes 1 inputs"):
        fc.explain(traced)


def test_a_graph_of_fake_gpu_tensors_is_judged_as_the_gpus_without_one() -> None:
    with fake_mode(), torch.no_grad():
        x = torch.randn(8, 8, device="cuda")

        def program(x: Tensor) -> tuple[Tensor, ...]:
            return torch.linalg.eigh(x @ x.T)[0], x.cpu(), x + torch.ones(())

        module = make_fx(program)(x)
    explanation = fc.explain(module, device="h200")
    assert explanation.environment.device == "cuda"
    assert [(f.kind, f.op) for f in explanation.findings] == [
        ("capture_unsafe", "aten._linalg_eigh.default"),
        ("host_sync", "aten._to_copy.default"),
        ("cpu_tensor", "ones"),
    ]
    assert "h200" in explanation.environment.roofline
