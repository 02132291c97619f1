"""``keep_gradients``: after a step ``p.grad`` is the ordinary loop's, in the same memory each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small_models import PROGRAMS, assert_same_weights, batches, compiled, mlp, squared_error, torch_loop

WAYS = {**PROGRAMS, "run": {"backend": "aot_eager", "capture": "run"}}


def loop_gradients(model: nn.Module, data: list[tuple[Tensor, Tensor]], parts: int = 1) -> list[list[Tensor]]:
    """``.grad`` of every parameter after each step of the ordinary loop."""
    optimizer, found = torch.optim.AdamW(model.parameters()), []
    for x, y in data:
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (squared_error(model, a, b) / parts).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if all(bool(g.isfinite().all()) for g in found[-1]):
            optimizer.step()
    return found


@pytest.mark.parametrize(("way", "parts"), [("captured", 2), ("run", 1), ("eager", 1), ("eager", 2)])
def test_a_gradient_is_the_loops_before_clipping_and_of_a_skipped_step_too(way: str, parts: int) -> None:
    data = batches(4)
    data[2] = data[2][0] * float("inf"), data[2][1]
    wanted = loop_gradients(mlp(), data, parts)
    model = mlp()
    step = compiled(model, keep_gradients=True, accumulate=parts, **WAYS[way])
    places = set()
    for batch, gradients in zip(data, wanted, strict=True):
        step(*batch)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            # To a few roundings of fp32, as another order of sums makes.
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6, equal_nan=True)
        places.add(tuple(p.grad.data_ptr() for p in model.parameters() if p.grad is not None))
    assert len(places) == 1
    assert int(step.metrics["skipped"]) == 1


def test_clipping_changes_the_update_and_not_the_gradient() -> None:
    model = mlp()
    step = compiled(model, keep_gradients=True, clip_grad_norm=1e-3, mode="eager")
    step(*batches(1)[0])
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(norm, step.metrics["grad_norm"])
    assert norm > 1e-2


def test_zeroing_between_steps_is_the_ordinary_loops() -> None:
    data, model, reference = batches(3), mlp(), mlp()
    torch_loop(reference, data)
    step = compiled(model, keep_gradients=True)
    for i, batch in enumerate(data):
        model.zero_grad(set_to_none=i == 0)
        step(*batch)
    assert_same_weights(model, reference)
    assert all(p.grad is not None for p in model.parameters())


def test_parameters_of_half_precision_have_gradients_of_their_dtype() -> None:
    model = mlp(torch.bfloat16)
    wanted = loop_gradients(mlp(torch.bfloat16), batches(1, dtype=torch.bfloat16))[0]
    step = compiled(model, keep_gradients=True, mode="eager")
    step(*batches(1, dtype=torch.bfloat16)[0])
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unread = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def test_what_the_loss_never_reads_has_no_gradient() -> None:
    model = TwoHeads()
    step = compiled(model, keep_gradients=True, mode="eager")
    with pytest.warns(UserWarning, match=r"the loss never reads unread\.weight, unread\.bias"):
        step(*batches(1)[0])
    assert model.used.weight.grad is not None
    assert model.unread.weight.grad is None


def test_gradients_go_with_the_step() -> None:
    model = mlp()
    step = compiled(model, keep_gradients=True, mode="eager")
    step(*batches(1)[0])
    step.release()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_not_in_a_checkpoint() -> None:
    plain, kept = compiled(mlp(), mode="eager"), compiled(mlp(), keep_gradients=True, mode="eager")
    for step in (plain, kept):
        step(*batches(1)[0])
    assert kept.state_dict()["optimizer"].keys() == plain.state_dict()["optimizer"].keys()


def reads_the_last(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    gradient = model[0].weight.grad  # type: ignore[index]
    loss = F.mse_loss(model(x), y)
    return loss if gradient is None else loss + gradient.square().sum()


@pytest.mark.parametrize("options", PROGRAMS.values(), ids=PROGRAMS)
def test_a_loss_that_reads_them_is_refused(options: dict[str, Any]) -> None:
    step = compiled(mlp(), reads_the_last, keep_gradients=True, **options)
    with pytest.raises(ValueError, match=r"the loss reads 0\.weight\.grad, which is None while it runs"):
        step(*batches(1)[0])


def test_without_the_option_such_a_loss_is_told_what_it_reads() -> None:
    model, reference, data = mlp(), mlp(), batches(2)
    step = compiled(model, reads_the_last)
    with pytest.warns(UserWarning, match=r"the loss reads 0\.weight\.grad, which is None .* keep_gradients=True"):
        step(*data[0])
    step(*data[1])
    torch_loop(reference, data, reads_the_last)  # with zero_grad() before the loss
    assert_same_weights(model, reference)
    assert all(p.grad is None for p in model.parameters())


def test_a_switch_is_wanted() -> None:
    with pytest.raises(TypeError, match="keep_gradients='yes' is a str; give True or False"):
        compiled(mlp(), keep_gradients="yes")
