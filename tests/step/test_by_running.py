<<<<<<< HEAD
"""A pure step as one graph of ATen operators, and back."""
=======
"""A step captured by running it: what its inputs are called, which keep their addresses, and whose lines it carries."""
>>>>>>> released

from __future__ import annotations

from typing import Any

<<<<<<< HEAD
import torch
from torch import Tensor

from fusion_compile._step.by_running import CapturedStep

Batch = tuple[Any, ...]


def start() -> tuple[dict[str, Tensor], Batch]:
    return {"w": torch.ones(2), "n": torch.zeros((), dtype=torch.int64)}, ({"x": torch.full((2,), 3.0)}, True)


def test_a_captured_step_writes_the_state_and_returns_what_is_new() -> None:
    offset = torch.tensor([10.0, 20.0])

    def advance(state: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"w": state["w"] * batch[0]["x"] + offset, "n": state["n"] + 1, "last": batch[0]["x"] * 2}

    state, batch = start()
    step = CapturedStep(advance, state, batch)
    assert state["w"].tolist() == [1.0, 1.0] and [c is offset for c in step.constants] == [True]
    step.compile(state, batch, mode="default", backend="aot_eager")
    fresh = step(state, batch)
    assert (state["w"].tolist(), int(state["n"]), fresh["last"].tolist()) == ([13.0, 23.0], 1, [6.0, 6.0])
    assert fresh.keys() == {"last"}


def test_what_is_closed_over_is_read_at_every_run() -> None:
    scale = torch.ones(2)
    state, batch = start()
    step = CapturedStep(lambda state, batch: {"w": state["w"] * scale}, state, batch)
    scale.fill_(5.0)
    step(state, batch)
    assert state["w"].tolist() == [5.0, 5.0]


def test_every_input_says_what_it_is() -> None:
    offset = torch.ones(2)
    state, batch = start()
    step = CapturedStep(lambda state, batch: {"w": state["w"] + batch[0]["x"] + offset}, state, batch)
    labels = [node.meta["label"] for node in step.graph.graph.find_nodes(op="placeholder")]
    assert labels == ["state/w", "state/n", "batch[0]['x']", "constant/0"]
=======
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
>>>>>>> released
