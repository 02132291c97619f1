"""The optimizer's state by parameter name: views of the banks, plain numbers, masters."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile._state.banks import build_layout
from fusion_compile._state.named_state import kept_parts, named_state
from fusion_compile._state.routing import route


def test_names_are_part_and_parameter_and_tensors_are_views() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    layout = build_layout(model, route(model, ("scalar",)))
    bank = torch.arange(16.0)  # 4 entries and 2, each parameter padded to 8
    state = {
        "params/scalar/bfloat16": bank,
        "module/scalar/bfloat16": bank.to(torch.bfloat16),
        "optimizer/0/mu/scalar/bfloat16": 2 * bank,
        "optimizer/0/beta1_power": torch.ones(()),
        "hyperparameters": torch.zeros(3),
        "metrics/loss": torch.zeros(()),
    }
    named = named_state(layout, state)
    assert list(named) == ["master.weight", "master.bias", "0.mu.weight", "0.mu.bias", "0.beta1_power"]
    assert named["0.mu.weight"].tolist() == [[0.0, 2.0], [4.0, 6.0]]
    named["0.mu.bias"].fill_(-1.0)
    assert state["optimizer/0/mu/scalar/bfloat16"][8:10].tolist() == [-1.0, -1.0]
    parts = [(part, key) for part, key, _ in kept_parts(layout, state, "x")]
    assert parts == [("x", "scalar/bfloat16"), ("0.mu", "scalar/bfloat16"), ("0.beta1_power", None)]


def test_weights_without_a_second_copy_are_the_models_own() -> None:
    model = nn.Linear(2, 2)
    layout = build_layout(model, route(model, ("scalar",)))
    assert named_state(layout, {"params/scalar/float32": torch.zeros(8)}) == {}
