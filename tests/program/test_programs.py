"""Programs are compiled at their first call, never again, and forgotten when that call fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_compile._program.program import Program
from fusion_compile._program.programs import GraphRefused, Programs


def doubling(t: Tensor) -> None:
    t.mul_(2)


def compile_doubling(programs: Programs, key: Any, t: Tensor, **options: Any) -> None:
    programs.compile(key, doubling, t, **{"mode": "default", "what": "a test", **options})


def test_the_first_call_runs_and_later_ones_rerun_the_same_program() -> None:
    programs, t = Programs("aot_eager"), torch.ones(3)
    assert not programs.rerun("a", t) and t.tolist() == [1.0] * 3
    compile_doubling(programs, "a", t)
    assert programs.rerun("a", t) and t.tolist() == [4.0] * 3
    compile_doubling(programs, "b", t)
    assert list(programs.captured) == ["a", "b"] and len(programs) == 2 and "a" in programs
    programs.forget()
    assert not programs.rerun("a", t) and len(programs) == 0


def test_a_later_call_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    programs, t = Programs("aot_eager"), torch.ones(3)
    compile_doubling(programs, "a", t)
    other = torch.ones(5)
    with pytest.raises(RuntimeError, match="the compiled program no longer fits what surrounds it"):
        programs.rerun("a", other)
    assert other.tolist() == [1.0] * 5


def test_a_refused_graph_has_not_run_and_is_forgotten() -> None:
    programs, t = Programs("aot_eager"), torch.ones(3)

    def refuse(program: Program) -> None:
        raise GraphRefused("not this one.", program)

    with pytest.raises(GraphRefused, match=r"^not this one\.$") as caught:
        compile_doubling(programs, "a", t, check=refuse)
    assert caught.value.program.nodes == 1
    assert t.tolist() == [1.0] * 3 and not programs.captured and "a" not in programs


def test_a_function_that_fails_is_forgotten() -> None:
    programs = Programs("aot_eager")

    def fails(t: Tensor) -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        programs.compile("a", fails, torch.ones(2), mode="eager", what="a test")
    assert "a" not in programs and len(programs) == 0


def test_eager_keeps_the_function_and_captures_nothing() -> None:
    programs, t = Programs("inductor"), torch.ones(2)
    compile_doubling(programs, "a", t, mode="eager")
    assert programs.rerun("a", t) and t.tolist() == [4.0, 4.0]
    assert programs.captured == {}
