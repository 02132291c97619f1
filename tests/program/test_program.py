"""A captured graph: its inputs by name, its operators by region, its host syncs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fusion_compile as fc
from fusion_compile._program.program import REGIONS, Program, refuse_host_syncs, region_of
from fusion_compile.passes import Finding
from tests.small_models import batches, compiled, mlp


@pytest.fixture(scope="module")
def program() -> Program:
    step = compiled(mlp())
    step(*batches(1)[0])
    (program,) = step.programs
    return program


def test_inputs_are_called_by_where_they_come_from(program: Program) -> None:
    names = set(program.input_names.values())
    assert {"batch/0", "batch/1", "state/params/scalar/float32", "state/counts/step"} <= names


def test_operators_are_counted_by_region(program: Program) -> None:
    counts = program.operators()
    assert tuple(counts) == REGIONS
    assert counts["forward"]["tanh"] == 1 and counts["backward"]["tanh_backward"] == 1
    assert sum(c.total() for c in counts.values()) == sum(n.op == "call_function" for n in program.aten.graph.nodes)


def test_a_step_has_one_backward_and_checkpoints_nothing(program: Program) -> None:
    assert (program.backwards, program.checkpoints) == (1, 0)
    assert program.nodes > 10 and program.not_in_aten == ""
    assert program.findings(thorough=True) == ()


def test_a_node_without_a_tag_belongs_to_the_state() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1).graph
    assert {region_of(node) for node in graph.nodes} == {"state"}


def test_a_graph_that_waits_is_refused_with_the_users_line() -> None:
    refuse_host_syncs((), on_cpu=False)
    finding = Finding("host_sync", "aten.item", "model.py:3", "It waits for the device.", "Keep it a tensor.")
    with pytest.raises(ValueError, match=r"^model.py:3\naten.item: It waits for the device. Keep it a tensor.$"):
        refuse_host_syncs((finding,), on_cpu=True)


@pytest.mark.parametrize("solve", [lambda x: torch.linalg.solve(x, x), lambda x: torch.linalg.eigh(x)[0]])
def test_a_solver_is_refused_on_a_gpu_alone(solve: Callable[[Tensor], Tensor]) -> None:
    findings = Program(torch.fx.symbolic_trace(solve)).findings(thorough=False)
    assert len(findings) == 1
    refuse_host_syncs(findings, on_cpu=True)
    with pytest.raises(ValueError, match=r"^the step\nlinalg_(solve|eigh): "):
        refuse_host_syncs(findings, on_cpu=False)


def test_the_explanation_of_a_step_reads_the_same_program() -> None:
    step = fc.compile_training_step(mlp(), lambda m, x, y: (m(x) - y).square().mean(), backend="aot_eager")
    step(*batches(1)[0])
    assert [graph.name for graph in step.explain().graphs] == ["step 0"]
