"""A step captured by running it: what its inputs are called, which keep their addresses, and whose lines it carries."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from tests.small_models import batches, compiled, mlp

TEACHER = mlp()


def distilled(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    hidden = checkpoint(model, batch["x"], use_reentrant=False)
    return F.mse_loss(hidden, TEACHER(batch["pair"][0]).detach())


def graph_of(step: fc.TrainingStep) -> fx.Graph:
    (program,) = step.programs
    assert program.captured_by == "run"
    return program.graph.graph


def distilling(**options: Any) -> fc.TrainingStep:
    step = compiled(mlp(), distilled, capture="run", **options)
    x, y = batches(1)[0]
    step({"x": x, "pair": (x, y)})
    return step


def test_inputs_are_called_as_in_a_step_that_is_read() -> None:
    names = list(distilling().programs[0].input_names.values())
    assert [name for name in names if name.startswith("batch")] == ["batch/0/x", "batch/0/pair/0", "batch/0/pair/1"]
    assert "state/params/scalar/float32" in names and "state/counts/step" in names


def test_everything_but_the_batch_keeps_its_address() -> None:
    moving = [
        node.meta["label"]
        for node in graph_of(distilling()).find_nodes(op="placeholder")
        if "_dynamo_static_input_type" not in node.meta.get("tensor_dict", {})
    ]
    assert moving == ["batch/0/x", "batch/0/pair/0", "batch/0/pair/1"]


def test_inductor_takes_them_for_static(monkeypatch: Any) -> None:
    """As the compiler sees it; that a CUDA graph then copies the batch alone is for a GPU to show."""
    from torch._functorch._aot_autograd import frontend_utils

    found: list[list[int]] = []
    original = frontend_utils._try_get_metadata_from_dynamo

    def listening(*given: Any) -> Any:
        out = original(*given)
        found.append(out[1])
        return out

    monkeypatch.setattr("torch._functorch.aot_autograd._try_get_metadata_from_dynamo", listening)
    names = list(distilling().programs[0].input_names.values())
    assert found[-1] == [i for i, name in enumerate(names) if not name.startswith("batch")]


def test_nodes_of_forward_recomputation_and_backward_carry_the_users_line() -> None:
    def line(kind: str) -> set[str]:
        nodes = [n for n in graph_of(distilling()).nodes if kind in str(n.target)]
        return {(n.meta["stack_trace"] or "").strip().splitlines()[-1].strip() for n in nodes}

    assert line("mse_loss") == {'return F.mse_loss(hidden, TEACHER(batch["pair"][0]).detach())'}
    assert line("tanh") == {
        'hidden = checkpoint(model, batch["x"], use_reentrant=False)',
        'return F.mse_loss(hidden, TEACHER(batch["pair"][0]).detach())',
    }


def test_backwards_and_checkpoints_are_counted_in_the_graph() -> None:
    (program,) = distilling().programs
    assert (program.backwards, program.checkpoints) == (1, 1)
    (program,) = distilling(accumulate=2).programs
    assert (program.backwards, program.checkpoints) == (2, 2)


def test_the_explanation_says_which_way_and_how_much_is_recomputed() -> None:
    explanation = fc.explain(distilling())
    (table,) = [s for s in explanation.sections if s.heading.startswith("Program 0")]
    assert "calls as captured by running, 7 of them recompute 1 checkpointed regions" in table.heading
    assert explanation.findings == ()
