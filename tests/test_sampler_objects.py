"""Objects among the arguments: their tensors are inputs, and what a forward writes into them is not lost."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc

X = torch.randn(2, 4)
TIMES = (0.9, 0.5, 0.1)


@dataclasses.dataclass
class Cond:
    text: Tensor
    scale: float = 1.0


class Cache:
    """Keys of a reference, as video models keep them for all steps of a segment."""

    def __init__(self, key: Tensor | None = None) -> None:
        self.layers: list[dict[str, Any]] = [{"key": key}]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(1, 4)

    def early(self, t: Tensor) -> Tensor:
        return self.b(t[:, None]).sin()

    @staticmethod
    def given(image: Tensor) -> Any:
        """The container of a call, where a class takes one."""
        return None


class Reads(Base):
    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.a(x) * self.early(t) + self.a(cond.text) * cond.scale


class Keeps(Base):
    """Writes into its argument where there is nothing yet, as ``kv_cache_mode="extract"`` does, and else reads."""

    def forward(self, x: Tensor, t: Tensor, cache: Cache) -> Tensor:
        layer = cache.layers[0]
        if layer["key"] is None:
            layer["key"] = self.a(x)
        return self.a(x) * self.early(t) + layer["key"]


class Collects(Base):
    def forward(self, x: Tensor, t: Tensor, states: list[Tensor]) -> Tensor:
        states.append(self.a(x))
        return torch.stack(states).sum(0) * self.early(t)


class Takes(Base):
    """Consumes a key of the dictionary that it is given, as the first IP-adapters did."""

    def forward(self, x: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
        return self.a(x) * self.early(t) + options.pop("image")

    @staticmethod
    def given(image: Tensor) -> dict[str, Any]:
        return {"image": image, "other": 1.0}


class Empties(Base):
    def forward(self, x: Tensor, t: Tensor, states: list[Tensor]) -> Tensor:
        return self.a(x) * self.early(t) + states.pop(0) * states.pop(1)

    @staticmethod
    def given(image: Tensor) -> list[Tensor]:
        return [image, image + 1, image]


class Table(Base):
    def forward(self, x: Tensor, t: Tensor, table: Any) -> Tensor:
        return self.a(x) * self.early(t) + torch.from_numpy(table)


class Gives(Base):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return Cond(self.a(x) * self.early(t)), None, {"n": 3}


class Asks(Base):
    def forward(self, x: Tensor, t: Tensor, other: nn.Module) -> Tensor:
        return self.a(x) * self.early(t) + other(x)


def at(t: float) -> Tensor:
    return torch.full((2,), t)


def pair(kind: type[Base]) -> tuple[Base, fc.Sampler]:
    model = kind().eval().requires_grad_(False)
    return model, fc.optimize_sampler(model, 4, mode="eager")


def test_a_dataclass_is_a_request_and_not_a_constant() -> None:
    """A new object at each call had a program of its own, and one that was written into kept its first numbers."""
    model, sampler = pair(Reads)
    held = Cond(torch.randn(2, 4))
    for text in (torch.randn(2, 4), torch.randn(2, 4)):
        held.text = text
        for t in TIMES:
            for cond in (held, Cond(text)):
                assert torch.equal(sampler(X, at(t), cond), model(X, at(t), cond))
    assert len(sampler.report.programs) == 1 and "cond=request" in str(sampler.report)
    held.text.mul_(2)
    assert torch.equal(sampler(X, at(0.5), held), model(X, at(0.5), held))
    held.scale = 0.5
    assert torch.equal(sampler(X, at(0.5), held), model(X, at(0.5), held))
    assert len(sampler.report.programs) == 2


@pytest.mark.parametrize("given", [{}, {"timesteps": TIMES}])
def test_a_cache_that_is_only_read_is_hoisted(given: dict[str, Any]) -> None:
    model = Keeps().eval().requires_grad_(False)
    sampler = fc.optimize_sampler(model, 3, mode="eager", **given)
    for _ in range(3):
        cache = Cache(torch.randn(2, 4))
        for t in TIMES:
            x = torch.randn(2, 4)
            assert torch.equal(sampler(x, at(t), cache), model(x, at(t), cache))
    assert len(sampler.report.programs) == 1
    assert sampler.release_weights(to="drop") > 0


@pytest.mark.parametrize(
    ("kind", "make", "name"),
    [(Keeps, Cache, "cache, a Cache"), (Collects, list, "states, a list")],
)
def test_what_a_forward_writes_into_an_argument_is_there(kind: type[Base], make: Callable[[], Any], name: str) -> None:
    """A list that grew in the trace alone was empty at each call."""
    model, sampler = pair(kind)
    mine, reference = make(), make()
    with pytest.warns(UserWarning, match=f"writes into its argument {name}.*the whole model serves"):
        got = [sampler(X, at(t), mine) for t in TIMES]
    assert all(map(torch.equal, got, [model(X, at(t), reference) for t in TIMES]))
    if kind is Collects:
        assert len(mine) == 3 and all(map(torch.equal, mine, reference))
    else:
        assert torch.equal(mine.layers[0]["key"], reference.layers[0]["key"])


@pytest.mark.parametrize("kind", [Takes, Empties])
def test_what_a_forward_takes_out_is_gone_and_the_call_is_hoisted(kind: type[Base]) -> None:
    """diffusers' UNet pops a T2I-Adapter's residuals off the list that it is given."""
    model, sampler = pair(kind)
    for image in (torch.randn(2, 4), torch.randn(2, 4)):
        for t in TIMES:
            mine, reference = (kind.given(image) for _ in range(2))
            assert torch.equal(sampler(X, at(t), mine), model(X, at(t), reference))
            assert len(mine) == len(reference) == 1
    assert len(sampler.report.programs) == 1


def test_arrays_of_numpy_are_told_apart_by_what_they_hold() -> None:
    model, sampler = pair(Table)
    table = np.ones((2, 4), np.float32)
    for _ in range(2):
        for t in TIMES:
            assert torch.equal(sampler(X, at(t), table), model(X, at(t), table))
            assert torch.equal(sampler(X, at(t), table.copy()), model(X, at(t), table))
        table *= 3
    assert len(sampler.report.programs) == 2


def test_an_output_may_hold_objects_and_constants() -> None:
    model, sampler = pair(Gives)
    for t in TIMES:
        (got, nothing, rest), (expected, _, _) = sampler(X, at(t)), model(X, at(t))
        assert isinstance(got, Cond) and torch.equal(got.text, expected.text) and got.scale == 1.0
        assert nothing is None and rest == {"n": 3}


def test_an_object_of_which_nothing_is_known_is_left_to_the_model() -> None:
    model, sampler = pair(Asks)
    other = nn.Linear(4, 4).requires_grad_(False)
    with pytest.warns(UserWarning, match="other holds a Linear; what such an object does to the output cannot be"):
        first = sampler(X, at(0.5), other)
    assert torch.equal(first, model(X, at(0.5), other))
    nn.init.ones_(other.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(sampler(X, at(0.5), other), model(X, at(0.5), other))
