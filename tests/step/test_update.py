"""The optimizer's update over banks as pure functions, and the same written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile import optim
from fusion_compile._state import flat_tree
from fusion_compile._state.banks import build_layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.routing import route
from fusion_compile._step.update import UpdatePlan, donated, pure_periodic, pure_update
from fusion_compile.optim import Transform

BANK = "scalar/float32"


def plan_and_state(transform: Transform) -> tuple[UpdatePlan, dict[str, Tensor]]:
    model = nn.Linear(4, 2, bias=False)
    layout = build_layout(model, route(model, ("scalar",)))
    optimizer = transform.init({BANK: torch.ones(8)})
    numbers = Hyperparameters(transform.hyperparameters, torch.device("cpu"), torch.float32)
    plan = UpdatePlan(layout, transform, flat_tree.form(optimizer, "optimizer"), numbers)
    flat = dict(flat_tree.flatten(optimizer, "optimizer"))
    return plan, {f"params/{BANK}": torch.ones(8), "hyperparameters": numbers.tensor, **flat}


def test_updates_are_added_and_no_argument_changes() -> None:
    plan, state = plan_and_state(optim.chain(optim.scale_by_momentum(0.5), optim.scale_by_learning_rate(0.25)))
    before = {k: t.clone() for k, t in state.items()}
    new, updates = pure_update(plan, state, {BANK: torch.full((8,), 2.0)}, plan.context(state))
    assert torch.equal(updates[BANK], new[f"params/{BANK}"] - 1.0)
    assert set(new) == {k for k in state if k != "hyperparameters"}
    assert all(torch.equal(t, before[k]) for k, t in state.items())


def test_a_state_tensor_that_comes_back_untouched_is_not_written() -> None:
    def init(params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.zeros(()), torch.zeros(())

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        return updates, (state[0], state[1] + 1)

    plan, state = plan_and_state(Transform(init, update, optim.Extras(hyperparameters={"lr": 1.0})))
    new, _ = pure_update(plan, state, {BANK: torch.zeros(8)}, plan.context(state))
    assert set(new) == {f"params/{BANK}", "optimizer/1"}
    work = pure_periodic(plan, lambda own, params, context: (own[0] + 5, own[1]))
    assert {k: float(t) for k, t in work(state).items()} == {"optimizer/0": 5.0}


def test_donated_writes_into_the_states_own_tensors() -> None:
    state = {"a": torch.zeros(2), "b": torch.zeros((), dtype=torch.float64)}
    addresses = {k: t.data_ptr() for k, t in state.items()}
    donated(lambda state, step: {k: t + step for k, t in state.items()})(state, 3.0)
    assert {k: t.data_ptr() for k, t in state.items()} == addresses
    assert state["a"].tolist() == [3.0, 3.0] and float(state["b"]) == 3.0


def test_the_gradient_point_and_diagnostics_of_a_transform_without_them() -> None:
    plan, state = plan_and_state(optim.adamw())
    assert plan.gradient_point(state, plan.context(state))[BANK] is state[f"params/{BANK}"]
    assert plan.diagnostics(state) == {}


def test_fresh_is_the_state_before_the_first_step() -> None:
    plan, state = plan_and_state(optim.adamw())
    moved = {**state, **pure_update(plan, state, {BANK: torch.ones(8)}, plan.context(state)).new}
    fresh = plan.fresh(moved)
    assert fresh.keys() == {k for k in state if k.startswith("optimizer/")}
    assert all(torch.equal(t, state[k]) for k, t in fresh.items())
