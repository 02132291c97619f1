"""A callable with example inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.explain._facts import GraphFacts


def flops(graph: GraphFacts, *regions: str) -> int:
    return sum(r.flops for r in graph.regions if r.name in regions or not regions)


def test_what_cannot_be_one_graph_is_explained_in_pieces_and_left_as_it_was() -> None:
    class Counts(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            y = self.linear(x)
            if y.sum() > 0:
                y = y * 2
            return self.linear(y)

    model, x = Counts(), torch.randn(2, 4)
    explanation = fc.explain(model, (x,), backend="eager")
    assert len(explanation.graphs) == 2
    assert flops(explanation.graphs[0]) == flops(explanation.graphs[1]) == 2 * 2 * 4 * 4
    assert [f.kind for f in explanation.findings] == ["host_sync"]
    assert float(model.calls) == 0
