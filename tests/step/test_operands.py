"""Numbers that remember how they were computed, and the tensors that torch gets for them."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_compile._capture.numbers.expressions import Expression, apply, number
from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._step.operands import NotAnOperand, Operands

N = number(0, "n")


def operands(value: Any, *expressions: Expression) -> tuple[dict[str, Any], Operands]:
    holder = {"n": value}
    return holder, Operands([Slot(holder, "n", "n")], expressions, torch.device("cpu"))


def test_inputs_are_the_values_of_the_expressions_now() -> None:
    holder, found = operands(3, N, apply("truediv", N, 4))
    assert [(t.tolist(), t.dtype) for t in found.inputs()] == [([3], torch.int64), ([0.75], torch.float64)]
    holder["n"] = 8
    assert [t.tolist() for t in found.inputs()] == [[8], [2.0]]


def test_torch_gets_the_tensor_and_python_the_number() -> None:
    holder, found = operands(3, apply("sub", 4.0, apply("add", N, 1)))
    replaced = [torch.tensor([100.0], dtype=torch.float64)]
    with found.standing_in(replaced):
        holder["n"] += 1
        weight = max(-1.0, 4.0 - holder["n"])
        assert isinstance(weight, float) and weight == 0.0 and f"{weight:.1f}" == "0.0" and math.cos(weight) == 1.0
        out = torch.ones(2) * weight
    assert out.tolist() == [100.0, 100.0] and out.dtype == torch.float32
    assert holder == {"n": 3}


CALLS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "after": lambda x, n: x - n,
    "before": lambda x, n: n - x,
    "power": lambda x, n: x**n,
    "in place": lambda x, n: x.clone().mul_(n),
    "added so many times": lambda x, n: x.clone().add_(x, alpha=n) + torch.sub(x, x, alpha=n),
    "a product so many times": lambda x, n: x.addcmul(x, x, value=n) + x.addcdiv(x, x, value=n),
    "of many": lambda x, n: torch.stack([*torch._foreach_add([x], [x], alpha=n), *torch._foreach_lerp([x], [-x], n)]),
    "clamp": lambda x, n: x.clamp(max=n),
    "where": lambda x, n: torch.where(x > 1, x, n),
    "full": lambda x, n: torch.full((3,), n),
    "full_like": lambda x, n: torch.full_like(x, n),
    "new_full": lambda x, n: x.new_full((3,), n),
    "integers": lambda x, n: torch.arange(3) + n,
    "a 0-dim tensor": lambda x, n: x.mean() * n,
    "half precision": lambda x, n: x.bfloat16() * n,
}


@pytest.mark.parametrize("value", [2, 0.5])
@pytest.mark.parametrize("call", CALLS)
def test_an_operator_gives_what_it_gives_for_the_plain_number(call: str, value: float) -> None:
    x = torch.tensor([0.5, 1.0, 3.0])
    holder, found = operands(value, N)
    with found.standing_in(found.inputs()):
        got = CALLS[call](x, holder["n"])
    expected = CALLS[call](x, value)
    assert torch.equal(got, expected) and got.dtype == expected.dtype


def test_a_number_of_a_backward_is_followed_too() -> None:
    holder, found = operands(0.5, N)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
            ctx.scale = scale
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return gradients[0] * ctx.scale, None

    x = torch.ones(2, requires_grad=True)
    with found.standing_in([torch.tensor([7.0], dtype=torch.float64)]):
        (gradient,) = torch.autograd.grad(Scaled.apply(x, holder["n"]).sum(), x)
    assert gradient.tolist() == [7.0, 7.0]


def test_an_operator_that_wants_it_plain_is_said() -> None:
    holder, found = operands(0.5, N)
    with pytest.raises(NotAnOperand, match="an operator wants the plain number"), found.standing_in(found.inputs()):
        torch.nn.functional.leaky_relu(torch.ones(2), holder["n"])
    assert holder == {"n": 0.5}


def test_a_use_that_was_not_seen_is_said() -> None:
    holder, found = operands(2, N, apply("mul", N, 3))
    with pytest.raises(NotAnOperand, match=r"n \* 3 is used where no tensor"), found.standing_in(found.inputs()):
        torch.ones(1) * holder["n"]
    with pytest.raises(NotAnOperand, match=r"n \+ 1 was not foreseen"), found.standing_in(found.inputs()):
        torch.ones(1) * (holder["n"] + 1)


def test_the_slots_get_their_numbers_back_after_an_error() -> None:
    state = types.SimpleNamespace(n=1)
    found = Operands([Slot(state, "n", "state.n")], [N], torch.device("cpu"))
    with pytest.raises(KeyError), found.standing_in(found.inputs()):
        raise KeyError
    assert state.n == 1 and type(state.n) is int
