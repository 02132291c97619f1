"""A pure step as one graph of ATen operators, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._step.by_running import CapturedStep

Batch = tuple[Any, ...]


def start() -> tuple[dict[str, Tensor], Batch]:
    return {"w": torch.ones(2), "n": torch.zeros((), dtype=torch.int64)}, ({"x": torch.full((2,), 3.0)}, True)


def test_a_captured_step_writes_the_state_and_returns_what_is_new() -> None:
    offset = torch.tensor([10.0, 20.0])

    def advance(state: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"w": state["w"] * batch[0]["x"] + offset, "n": state["n"] + 1, "last": batch[0]["x"] * 2}

    state, batch = start()
    step = CapturedStep(advance, state, batch)
    assert state["w"].tolist() == [1.0, 1.0] and [c is offset for c in step.constants] == [True]
    step.compile(state, batch, mode="default", backend="aot_eager")
    fresh = step(state, batch)
    assert (state["w"].tolist(), int(state["n"]), fresh["last"].tolist()) == ([13.0, 23.0], 1, [6.0, 6.0])
    assert fresh.keys() == {"last"}


def test_what_is_closed_over_is_read_at_every_run() -> None:
    scale = torch.ones(2)
    state, batch = start()
    step = CapturedStep(lambda state, batch: {"w": state["w"] * scale}, state, batch)
    scale.fill_(5.0)
    step(state, batch)
    assert state["w"].tolist() == [5.0, 5.0]


def test_every_input_says_what_it_is() -> None:
    offset = torch.ones(2)
    state, batch = start()
    step = CapturedStep(lambda state, batch: {"w": state["w"] + batch[0]["x"] + offset}, state, batch)
    labels = [node.meta["label"] for node in step.graph.graph.find_nodes(op="placeholder")]
    assert labels == ["state/w", "state/n", "batch/0/x", "constant/0"]


def test_every_operator_says_which_module_called_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
    state, batch = start()
    named = CapturedStep(lambda state, batch: {"w": state["w"] + model(state["w"]).detach()}, state, batch, model)
    found = {
        str(node.target): (node.meta.get("custom") or {}).get("module")
        for node in named.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    }
    assert found == {"aten.tanh.default": "1.0"}
