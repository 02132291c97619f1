"""A compiled function that can run its graph in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fusion_compile._program.beside_its_graph import Beside, BesideItsGraph
from fusion_compile._program.programs import Programs


def test_the_graph_is_shown_once_before_the_compiled_function_runs() -> None:
    seen: list[Any] = []
    graph = fx.symbolic_trace(lambda x: x + 1)
    both = BesideItsGraph(graph, lambda x: x + 2, lambda run, compiled: seen.append((run(), compiled())))
    assert [both(1), both(1), seen] == [3, 3, [(2, 3)]]
    both.runs_graph = True
    assert both(1) == 2
    both.forget_graph()
    assert both(1) == 3 and seen == [(2, 3)]


def test_a_program_of_programs_keeps_its_graph_until_it_is_told() -> None:
    programs, state = Programs("aot_eager"), torch.zeros(2)

    def add(x: torch.Tensor) -> None:
        x.add_(1)

    def first(run: Callable[[], object], compiled: Callable[[], object]) -> None:
        run()
        assert state.tolist() == [1.0, 1.0]

    programs.compile("key", add, state, mode="default", what="nothing", beside=Beside(first))
    assert state.tolist() == [2.0, 2.0] and programs.run_graph("key", state) and state.tolist() == [3.0, 3.0]
    programs.forget_graph("key")
    assert not programs.run_graph("key", state) and programs.rerun("key", state) and state.tolist() == [4.0, 4.0]


def test_what_the_first_look_refuses_is_not_kept() -> None:
    programs, state = Programs("aot_eager"), torch.zeros(2)

    def refuse(run: Callable[[], object], compiled: Callable[[], object]) -> None:
        raise ValueError("not that")

    with pytest.raises(ValueError, match="not that"):
        programs.compile("key", lambda x: x.add_(1), state, mode="default", what="nothing", beside=Beside(refuse))
    assert len(programs) == 0 and not programs.run_graph("key", state) and state.tolist() == [0.0, 0.0]
