"""numpy in a graph that Dynamo captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_compile.explain._graph.numpy_arrays import find_numpy, lines_of_numpy
from fusion_compile.explain._run.captured import capture
from tests.explain.run.lines import line_of


def found(fn: Callable[..., Any], *args: Any) -> list[tuple[str, str, str]]:
    (program,) = capture(fn, args, {})
    findings = find_numpy(program.graph.graph, program.input_names)
    return [(f.kind, f.op, f.where) for f in findings]


def test_what_numpy_makes_is_told_at_the_line_that_hands_it_to_torch() -> None:
    def program(x: Tensor) -> Tensor:
        angles = np.arange(4) / 3
        table = np.sin(angles)  # the table
        return x + torch.from_numpy(table).float()

    assert found(program, torch.ones(4)) == [("cpu_tensor", "np.sin", line_of(__file__, "the table"))]


def test_an_array_among_the_inputs_is_told_where_it_is_first_used() -> None:
    def program(x: Tensor, table: np.ndarray) -> Tensor:
        return x + torch.as_tensor(table)  # the use

    ((kind, op, where),) = found(program, torch.ones(4), np.ones(4, dtype=np.float32))
    assert (kind, where) == ("cpu_tensor", line_of(__file__, "the use")) and op == "given/1"
    assert found(lambda x, n: x * n, torch.ones(4), np.float32(3)) == []  # a number is no array


def test_a_tensor_that_numpy_gets_is_a_wait_unless_a_copy_says_so_already() -> None:
    def hidden(x: Tensor) -> Tensor:
        return torch.from_numpy(np.sin(x.numpy()) * 2).relu()  # the wait

    def copied(x: Tensor) -> Tensor:
        return torch.from_numpy(np.sin(x.detach().cpu().numpy())).relu()

    assert found(hidden, torch.ones(4)) == [("host_sync", "np.sin", line_of(__file__, "the wait"))]
    assert found(copied, torch.ones(4)) == []


def test_the_lines_of_numpy_are_known() -> None:
    def program(x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.ones(4, dtype=np.float32))  # by numpy

    (program_,) = capture(program, (torch.ones(4),), {})
    assert lines_of_numpy(program_.graph.graph) == {line_of(__file__, "by numpy")}
