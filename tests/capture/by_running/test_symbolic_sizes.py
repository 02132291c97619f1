"""Symbols in the place of sizes: what is asked of one is an assumption, and a size that becomes a number is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusion_compile._capture.by_running.symbolic_sizes import SizeFixed, SymbolicSizes
from fusion_compile._capture.by_running.trace import run_on_fakes

X, W = torch.ones(3, 4), torch.ones(4)


def traced(fn: Callable[[Tensor, Tensor], list[Tensor]]) -> tuple[SymbolicSizes, torch.fx.GraphModule]:
    """A trace in which the first size of the first input is a symbol."""
    symbols = SymbolicSizes([X, W], {(0, 0)})
    graph = run_on_fakes(fn, {"x": X, "w": W}, symbols=symbols)
    symbols.settle()
    return symbols, graph


def test_one_graph_is_right_for_every_size_that_answers_alike() -> None:
    def scaled(x: Tensor, w: Tensor) -> list[Tensor]:
        return [(x * w).sum() / x.shape[0] if x.shape[0] < 10 else x.sum()]

    symbols, graph = traced(scaled)
    assert [symbols.fit([torch.ones(n, 4), W]) for n in (1, 2, 9, 10)] == [False, True, True, False]
    assert [float(graph(torch.full((n, 4), n), W)[0]) for n in (2, 3, 9)] == [8.0, 12.0, 36.0]
    assert symbols.beside(torch.ones(5)).shape == (5,)


def test_without_an_assumption_any_size_fits_but_one() -> None:
    symbols, _ = traced(lambda x, w: [x + w])
    assert [symbols.fit([torch.ones(n, 4), W]) for n in (1, 2, 1000)] == [False, True, True]


@pytest.mark.parametrize(
    "number",
    [
        lambda n: len(range(n)),
        lambda n: int(str(n)),
        lambda n: int(f"{n}"),
        lambda n: int(f"{n:03d}"),
        lambda n: int(n),
    ],
    ids=["range", "str", "f-string", "format", "int"],
)
def test_a_size_that_becomes_a_number_is_refused_by_its_line(number: Callable[[int], int]) -> None:
    with pytest.raises(SizeFixed, match=r"torch fixes a size, at .*test_symbolic_sizes\.py:\d+: lambda n: "):
        traced(lambda x, w: [x * number(x.shape[0])])


def test_what_cannot_be_asked_of_a_symbol_is_an_error_and_no_other_branch() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        traced(lambda x, w: [x * {3: 2.0}.get(x.shape[0], 1.0)])
