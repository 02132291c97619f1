"""A model that keeps what it computed at its first call computes the same after it was traced."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile.sampler import optimize_sampler


class Table:
    """Fills itself at the first call, in no module."""

    def __init__(self) -> None:
        self.values: list[Tensor] | None = None
        self.by_size: dict[int, Tensor] = {}

    def __call__(self, n: int) -> Tensor:
        if self.values is None:
            self.values = [torch.arange(16.0).sin()]
        if n not in self.by_size:
            self.by_size[n] = torch.arange(float(n)).cos()
        return self.values[0][:n] + self.by_size[n]


@functools.lru_cache(maxsize=4)
def cached_function(n: int) -> Tensor:
    return torch.arange(float(n)).exp()


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.table = Table()
        self.kept: Any = None
        self.history: list[Tensor] = []

    @functools.lru_cache  # noqa: B019
    def cached_method(self, n: int) -> tuple[Tensor, int]:
        return torch.arange(float(n)).tan(), n

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = (torch.linspace(0, 1, 8), "text")
        if not self.history:
            self.history.append(torch.linspace(0, 2, 8))
        position = self.table(8) + cached_function(8) + self.cached_method(8)[0] + self.kept[0] + self.history[0]
        return self.linear(x + position) * t[:, None] + y[:, None]


X, T, Y = torch.randn(2, 8), torch.full((2,), 0.5), torch.randn(2)


@pytest.mark.parametrize("called_before", [False, True])
def test_the_model_is_right_after_it_was_traced(called_before: bool) -> None:
    cached_function.cache_clear()
    Keeps.cached_method.cache_clear()
    model = Keeps().eval()
    with torch.no_grad():
        position = sum(
            (torch.arange(8.0).sin(), torch.arange(8.0).cos(), torch.arange(8.0).exp(), torch.arange(8.0).tan())
        )
        position = position + torch.linspace(0, 1, 8) + torch.linspace(0, 2, 8)
        want = model.linear(X + position) * T[:, None] + Y[:, None]
        if called_before:
            model(X, T, Y)
        sampler = optimize_sampler(model, 4, mode="eager")
        torch.testing.assert_close(sampler(X, T, Y), want)
        torch.testing.assert_close(model(X, T, Y), want)
        if called_before:
            torch.testing.assert_close(sampler(X, T, Y), want)
        else:
            with pytest.warns(UserWarning, match="the sampler is built again"):  # by the model's own call
                torch.testing.assert_close(sampler(X, T, Y), want)


def test_what_was_kept_before_is_kept() -> None:
    model = Keeps().eval()
    with torch.no_grad():
        model(X, T, Y)
        kept, table, history = model.kept[0], model.table.values, model.history[0]
        optimize_sampler(model, 4, mode="eager", example_inputs=(X, T, Y))
    assert model.kept[0] is kept and model.table.values is table
    assert len(model.history) == 1 and model.history[0] is history


def test_nothing_of_a_failed_trace_stays() -> None:
    class Fails(Keeps):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            out = super().forward(x, t, y)
            return out if float(out.sum()) > 0 else -out

    model = Fails().eval()
    with torch.no_grad():
        with pytest.raises(ValueError, match="reads the contents of a tensor at"):
            optimize_sampler(model, 4, mode="eager").prepare((X, T, Y))
        assert model.kept is None and model.table.values is None and not model.table.by_size and not model.history
        first = model(X, T, Y)
        assert torch.equal(first, model(X, T, Y))
