"""What a view of one tensor is in another, and which tensors of a model share entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._shared_memory import memory_of, overlapping, part_of, parts_in, sharing, whole_of

VIEWS = {
    "row": lambda t: t[1],
    "column": lambda t: t[:, 1],
    "transposed": lambda t: t.t(),
    "block": lambda t: t[1:3, 1:3],
    "flat": lambda t: t.view(-1)[2:9],
    "itself": lambda t: t.detach(),
    "one": lambda t: t[2, 3],
    "broadcast": lambda t: t[1].expand(5, 4),
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("kind", VIEWS)
def test_a_part_is_what_the_view_would_be(kind: str, order: str) -> None:
    original = torch.arange(12.0).view(3, 4)
    value = torch.arange(100.0, 112.0).view(3, 4)
    if order == "columns":
        original, value = (t.t().contiguous().t() for t in (original, value))
    view = VIEWS["itself" if kind == "flat" and order == "columns" else kind]
    part = part_of(view(original), original, value)
    assert part is not None and torch.equal(part, view(value)) and memory_of(part) == memory_of(value)


def test_a_part_of_a_value_passes_gradients_on() -> None:
    original, value = torch.zeros(3, 4), torch.ones(3, 4, requires_grad=True)
    part = part_of(original[1:, 1], original, value)
    assert part is not None
    part.sum().backward()
    assert value.grad is not None and value.grad.sum() == 2 and value.grad[1:, 1].eq(1).all()


@pytest.mark.parametrize(
    ("view", "original", "value"),
    [
        pytest.param(lambda f: f[:5], lambda f: f[:4], torch.zeros(4), id="reaches beyond"),
        pytest.param(lambda f: f[:2], lambda f: f[1:4], torch.zeros(3), id="begins before"),
        pytest.param(lambda f: f[:4].view(torch.int32), lambda f: f[:4], torch.zeros(4), id="read as integers"),
        pytest.param(lambda f: f[:4], lambda f: f[:4].view(2, 2), torch.zeros(2, 2).t(), id="another order"),
        pytest.param(lambda f: f[:1], lambda f: f[:1].expand(3), torch.zeros(3), id="not dense"),
    ],
)
def test_what_is_no_plain_part_is_none(view: object, original: object, value: Tensor) -> None:
    flat = torch.zeros(12)
    assert part_of(view(flat), original(flat), value) is None  # type: ignore[operator]


def test_the_whole_is_found_and_the_parts_follow_it() -> None:
    flat = torch.arange(6.0)
    model = {"flat": flat, "end": flat[4:], "other": torch.zeros(2)}
    assert whole_of(model) == {"flat": "flat", "end": "flat"}
    assert parts_in(model) == {"end": "flat"}
    values = sharing(model, {n: t.clone() for n, t in model.items()}, parts_in(model))
    values["flat"].add_(10)
    assert torch.equal(values["end"], torch.tensor([14.0, 15.0])) and not values["other"].any()
    beside = sharing(model, {"flat": flat * 2}, parts_in(model))
    assert torch.equal(beside["end"], flat[4:] * 2) and memory_of(beside["end"]) == memory_of(beside["flat"])


def test_parts_without_a_whole_and_neighbours() -> None:
    flat = torch.zeros(8)
    parts = {"a": flat[:4], "b": flat[2:6], "c": flat[6:]}
    assert whole_of(parts) == {"a": None, "b": None}
    assert overlapping(parts) == [["a", "b"]]
    assert not overlapping({"a": flat[:4], "b": flat[4:]})


def test_what_has_no_strided_memory_shares_none() -> None:
    assert memory_of(torch.eye(2).to_sparse()) is None
    assert memory_of(nn.Parameter(torch.zeros(2))) is not None
    inside: list[int | None] = []
    torch.vmap(lambda t: inside.append(memory_of(t)) or t)(torch.zeros(2))  # type: ignore[func-returns-value]
    assert inside == [None]
