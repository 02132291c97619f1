"""The first two steps of a program against the ordinary loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._state import keys
from fusion_compile._step.proof import ROOM, Proof, take_compared
from fusion_compile._step.rehearsed import Outcome
from tests.small_models import batches, compiled


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


def test_a_step_that_is_read_must_leave_the_random_numbers_where_the_loop_does() -> None:
    wanted = Outcome(torch.tensor(2.0), torch.tensor(1.0), {}, torch.get_rng_state())
    check = Proof(wanted, state(), {torch.float32})
    assert check.objection_when_read(state()) == ""
    torch.rand(1)
    assert check.objection(state()) == ""
    assert "more or fewer random numbers" in check.objection_when_read(state())
    assert check.objection_when_read(state(loss=3.0)).startswith("its loss is 3")


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


def setting(now: dict[str, Tensor], loss: float) -> Callable[[], dict[str, Tensor]]:
    """A step that computes this loss and counts itself."""

    def step() -> dict[str, Tensor]:
        now[keys.metrics("loss")].fill_(loss)
        now["counts/step"] += 1
        return {"fresh": torch.tensor(loss)}

    return step


@pytest.mark.parametrize(
    ("compiled_loss", "captured_loss", "draws_apart", "taken", "said"),
    [
        (2.0, None, False, 1, ("", "")),
        (3.0, None, False, 0, ("its loss is 3 where the ordinary loop has 2", "")),
        (3.0, 3.0, False, 0, ("its loss is 3 where the ordinary loop has 2", "")),
        (3.0, 2.0, False, 1, ("", "its loss is 3 where the ordinary loop has 2")),
        (3.0, 2.0, True, 1, ("", "")),
        (2.0, 3.0, True, 0, ("its loss is 3 where the ordinary loop has 2", "")),
        (3.0, None, True, 1, ("", "")),
    ],
)
def test_a_step_is_taken_once_or_not_at_all(
    compiled_loss: float, captured_loss: float | None, draws_apart: bool, taken: int, said: tuple[str, str]
) -> None:
    now = {**state(), "counts/step": torch.tensor(0)}
    captured = setting(now, captured_loss or 0.0)

    def uncompiled() -> None:
        captured()

    found = take_compared(
        now,
        proof(now),
        setting(now, compiled_loss),
        None if captured_loss is None else uncompiled,
        draws_apart=draws_apart,
    )
    assert (found.objection, found.rounding) == said
    assert int(now["counts/step"]) == taken and bool(found.fresh) is bool(taken)


@pytest.mark.parametrize(("norm", "is_refused"), [(0.0, True), (2.0, True), (1.2, False)])
def test_a_compiled_step_that_is_too_far_off_for_rounding_is_refused(norm: float, is_refused: bool) -> None:
    """A region that was dropped gives no gradient, while its graph has the right one."""
    now = state()

    def computes(value: float) -> Callable[[], dict[str, Tensor]]:
        def step() -> dict[str, Tensor]:
            now[keys.metrics("grad_norm")].fill_(value)
            return {}

        return step

    for alone in (None, contextlib.nullcontext):
        found = take_compared(now, proof(now), computes(norm), computes(1.0), draws_apart=False, alone=alone)
        assert ("so the compiler made an error" in found.objection) is is_refused
        assert bool(found.rounding) is not is_refused


def test_a_graph_that_there_is_no_memory_for_is_not_compared() -> None:
    now = {**state(), "counts/step": torch.tensor(0)}

    def too_large() -> None:
        now["counts/step"] += 5
        raise torch.OutOfMemoryError("too large")

    found = take_compared(now, proof(now), setting(now, 3.0), too_large, draws_apart=True)
    assert found.objection == "" and int(now["counts/step"]) == 1


def test_what_the_first_step_cannot_show_is_refused_at_the_second() -> None:
    import ctypes

    memory = ctypes.create_string_buffer(8)  # what no watch sees
    address = ctypes.addressof(memory)

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model(x) - y).square().mean() * (1.0 + ctypes.c_double.from_address(address).value)

    model = nn.Linear(4, 2)
    step = compiled(model, loss_fn, capture="run")
    x, y = batches(1)[0]
    step(x, y)
    ctypes.c_double.from_address(address).value = 1.0
    before, count = model.weight.clone(), int(step.metrics["step"])
    with pytest.raises(ValueError, match=r"in its second step its loss is .* where the ordinary loop has"):
        step(x, y)
    assert torch.equal(model.weight, before) and int(step.metrics["step"]) == count
