"""The first step of a program against the ordinary loop."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile._state import keys
from fusion_compile._step.proof import ROOM, Proof
from fusion_compile._step.rehearsed import Outcome


def state(loss: float = 2.0, norm: float = 1.0, mean: float = 0.5) -> dict[str, Tensor]:
    return {
        keys.metrics("loss"): torch.tensor(loss),
        keys.metrics("grad_norm"): torch.tensor(norm),
        keys.buffers("mean"): torch.full((2,), mean),
    }


def proof(before: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Proof:
    wanted = Outcome(torch.tensor(2.0), torch.tensor(1.0), {"mean": torch.full((2,), 0.5), "still": torch.ones(3)})
    return Proof(wanted, before, {dtype})


def test_the_ordinary_loops_numbers_are_no_objection() -> None:
    assert proof(state()).objection(state()) == ""


def test_the_first_number_that_differs_is_said() -> None:
    check = proof(state())
    assert check.objection(state(loss=2.1)) == "its loss is 2.1 where the ordinary loop has 2"
    assert check.objection(state(norm=0.0)) == "its gradient norm is 0 where the ordinary loop has 1"
    told = check.objection(state(mean=0.0))
    assert told == "its buffer mean is of norm 0 where the ordinary loop has of norm 0.707107"


def test_rounding_is_none_and_half_precision_has_more_of_it() -> None:
    near, far = 2.0 * (1 + 0.9 * ROOM[False]), 2.0 * (1 + 1.1 * ROOM[False])
    assert proof(state()).objection(state(loss=near)) == ""
    assert proof(state()).objection(state(loss=far)) != ""
    assert proof(state(), torch.bfloat16).objection(state(loss=far)) == ""


def test_a_loss_that_is_not_finite_must_be_so_in_both() -> None:
    assert "not a number" in proof(state()).objection(state(loss=float("nan")))
    wanted = Outcome(torch.tensor(float("inf")), torch.tensor(float("nan")), {})
    same = state(loss=float("inf"), norm=float("nan"))
    assert Proof(wanted, state(), {torch.float32}).objection(same) == ""


def test_a_step_is_undone_with_its_random_numbers_and_new_entries() -> None:
    now = state()
    check = proof(now)
    random = torch.get_rng_state()
    torch.randn(3)
    now[keys.metrics("loss")].fill_(9.0)
    now["carried/new"] = torch.ones(1)
    check.undo(now)
    assert now.keys() == state().keys() and float(now[keys.metrics("loss")]) == 2.0
    assert torch.equal(torch.get_rng_state(), random)
