"""The account of one value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusion_compile as fc


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
