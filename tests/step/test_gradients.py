"""Other backwards than the step's own add to ``.grad``, as in the ordinary loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._step.gradients import gradients
from tests.small_models import assert_same_weights, batches, compiled, torch_loop


class Reversible(torch.autograd.Function):
    """x + f(x), whose backward computes f again and calls ``backward`` on it, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + f(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.f(x), gradient)
        return gradient + x.grad, None


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = Reversible.apply(self.first(x), self.inner)
        out: Tensor = self.last(changed)
        return out


def reversible(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def adversarial(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The inner backward's gradients stay, as nobody takes them away."""
    moved = x.clone().requires_grad_()
    F.mse_loss(model(moved), y).backward()
    assert moved.grad is not None
    return F.mse_loss(model(x + 0.1 * moved.grad.sign()), y)


def model_of() -> Layered:
    torch.manual_seed(0)
    return Layered()


@pytest.mark.filterwarnings("ignore:the step is captured by running it")
@pytest.mark.parametrize(
    ("loss", "how"),
    [(reversible, {"mode": "eager"}), (adversarial, {"mode": "eager"}), (reversible, {"backend": "aot_eager"})],
)
def test_they_train_as_in_the_ordinary_loop(loss: Any, how: dict[str, Any]) -> None:
    model, reference = model_of(), model_of()
    step = compiled(model, loss, **how)
    losses = [step(*batch) for batch in batches(3)]
    torch.testing.assert_close(losses, torch_loop(reference, batches(3), loss))
    assert_same_weights(model, reference)
    assert all(p.grad is None for p in model.parameters())


def test_reading_does_not_see_them() -> None:
    step = compiled(model_of(), reversible, capture="read")
    with pytest.raises(ValueError, match=r"adds to the parameters' \.grad\. .* leave out capture='read', or take that"):
        step(*batches(1)[0])


def test_micro_batches_divide_no_gradient_of_a_backward_inside_of_the_loss() -> None:
    step = compiled(model_of(), adversarial, mode="eager", accumulate=2)
    with pytest.raises(ValueError, match=r"which the mean over micro-batches \(accumulate\) or the scale"):
        step(*batches(1)[0])


def test_what_was_added_is_added_and_taken_away() -> None:
    a, b, c = (torch.ones((), requires_grad=True) for _ in range(3))
    (5 * a + 7 * b).backward()
    both = gradients(2 * a, [a, b, c])
    assert [None if g is None else int(g) for g in both.found] == [7, 7, None] and both.accumulated
    assert a.grad is None and b.grad is None
    own = gradients(2 * a, [a, b])
    assert [None if g is None else int(g) for g in own.found] == [2, None] and not own.accumulated
