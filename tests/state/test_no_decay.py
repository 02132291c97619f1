"""Biases, norms and embeddings are found by the modules that hold them, whatever their names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile import no_decay


class RMSNormOfMine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)
        self.layers = nn.Sequential(nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1))
        self.mine = RMSNormOfMine()
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.frozen = nn.LayerNorm(4).requires_grad_(False)


def found(group: dict[str, Any], model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_parameters() if any(re.search(p, n) for p in group["params"])}


def test_every_kind_is_found_and_matrices_are_not() -> None:
    model = Block()
    group = no_decay(model)
    assert found(group, model) == {
        "scale",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.bias",
        "mine.gain",
        "table.weight",
    }
    assert {k: v for k, v in group.items() if k != "params"} == {"name": "no_decay", "weight_decay": 0.0}


def test_each_expression_matches_one_full_name() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"norm": nn.LayerNorm(2)}), "axnorm": nn.Linear(2, 2)})
    group = no_decay(model, "scalar_weight_decay")
    assert found(group, model) == {"a.norm.weight", "a.norm.bias", "axnorm.bias"}
    assert group["scalar_weight_decay"] == 0.0 and "weight_decay" not in group


def test_a_tied_head_is_its_embedding() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["table"].weight
    assert no_decay(model)["params"] == [r"^table\.weight$"]


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"no_decay\(\) got a list; give the model"):
        no_decay([])  # type: ignore[arg-type]
