"""Problems that a captured graph shows without a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fusion_compile.explain._graph.static_findings import (
    argument_names,
    defined_at,
    find_in_program,
    find_python_scalars,
)
from fusion_compile.explain._run.captured import capture
from tests.explain.run.lines import line_of


def scaled(x: Tensor, lr: float, /, *, momentum: float = 0.9) -> Tensor:  # the definition
    return x * lr * momentum


def test_floats_are_found_by_the_names_of_the_arguments() -> None:
    found = find_python_scalars(scaled, (torch.ones(2), 0.1), {"momentum": 0.5})
    assert [(f.kind, f.op, f.severity) for f in found] == [
        ("python_scalar", "lr", "warning"),
        ("python_scalar", "momentum", "warning"),
    ]
    assert {f.where for f in found} == {line_of(__file__, "the definition")}
    assert find_python_scalars(scaled, (torch.ones(2), torch.tensor(0.1)), {}) == ()


def test_names_and_lines_of_callables() -> None:
    assert argument_names(scaled) == ("x", "lr")
    assert argument_names(nn.Linear(2, 2)) == ("input",)
    assert argument_names(torch.sin) == ()
    assert defined_at(scaled) == line_of(__file__, "the definition")
    assert Path(defined_at(nn.Linear(2, 2)).rpartition(":")[0]).name == "linear.py"
    assert defined_at(torch.sin) == ""


def test_all_unmarked_inputs_that_one_line_writes_are_one_finding() -> None:
    def program(state: list[Tensor], x: Tensor) -> Tensor:
        for each in state:
            each.add_(x)  # the write
        return x

    (program_of_call,) = capture(program, ([torch.zeros(2), torch.zeros(2)], torch.ones(2)), {})
    (finding,) = find_in_program(program_of_call)
    assert (finding.kind, finding.where) == ("unmarked_mutation", line_of(__file__, "the write"))
    assert finding.op.endswith(" and 1 more") and "these 2 inputs" in finding.why


def test_a_parameter_that_is_written_is_marked_already() -> None:
    class Counts(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    (program,) = capture(Counts(), (torch.ones(2),), {})
    assert find_in_program(program) == ()
