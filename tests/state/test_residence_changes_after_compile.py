"""What may happen to a model between two steps: refused by name, or taken over, and never trained past."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from tests.refusals import refused, works
from tests.small_models import PROGRAMS, batches, compiled, mlp

X, Y = batches(1)[0]


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a step that runs uncompiled, and of one that is captured."""
    return PROGRAMS[request.param]


def _replace(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(8, 4))


def _retie(model: nn.Sequential) -> None:
    model[0].weight = model.get_parameter("0.twin.weight")


REBINDINGS: dict[str, tuple[Callable[[Any], object], str, str]] = {
    ".data =": (lambda m: setattr(m[0].weight, "data", torch.zeros(8, 4)), "0.weight [8, 4]", "was rebound"),
    ".data = a transposed view": (
        lambda m: setattr(m.square, "data", m.square.data.t()),
        "square [3, 3]",
        "was rebound",
    ),
    ".double()": (lambda m: m.double(), "square [3, 3]", "was rebound"),
    ".to(meta)": (lambda m: m[2].to("meta"), "2.weight", "was re"),
    "a new Parameter": (_replace, "0.weight [8, 4]", "was replaced by another tensor"),
    "tied to another": (_retie, "0.weight [8, 4]", "was replaced by another tensor"),
    "frozen": (lambda m: m[0].weight.requires_grad_(False), "0.weight [8, 4]", "was frozen"),
}


@pytest.mark.parametrize("kind", REBINDINGS)
def test_a_parameter_rebound_after_compile_is_refused_by_its_full_name(kind: str) -> None:
    rebind, name, how = REBINDINGS[kind]
    model = mlp()
    model.square = nn.Parameter(torch.randn(3, 3))
    model[0].twin = nn.Linear(4, 8)

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        total: Tensor = F.mse_loss(model(x), y) + model.square.square().sum() + model[0].twin(x).square().mean()
        return total

    step = compiled(model, loss, mode="eager")
    step(X, Y)
    rebind(model)
    kept = {n: t.clone() for n, t in step._state.items()}
    with pytest.raises(RuntimeError, match=rf"{re.escape(name)}.*{how}.*compile the step again"):
        step(X, Y)
    assert all(torch.equal(t, kept[n]) for n, t in step._state.items())


@pytest.mark.parametrize("at", [0, 17, 39])
def test_whichever_of_many_parameters_is_changed_is_noticed_at_the_next_call(at: int) -> None:
    """Also where its memory begins where it did."""
    model = nn.ParameterList(torch.zeros(3, 3) for _ in range(40))
    step = compiled(model, lambda model, x: sum((x @ p).square().mean() for p in model), mode="eager")
    step(x := torch.randn(2, 3))
    one = model[at]
    changes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "was rebound": (lambda: setattr(one, "data", one.data.t()), lambda: setattr(one, "data", one.data.t())),
        "was frozen": (lambda: one.requires_grad_(False), lambda: one.requires_grad_(True)),
    }
    for words, (change, undo) in changes.items():
        change()
        with refused(step, RuntimeError, f"{at} [3, 3] {words}"):
            step(x)
        undo()
        assert torch.isfinite(step(x))


def test_a_parameter_that_was_frozen_and_is_no_longer_is_refused(program: dict[str, Any]) -> None:
    """The ordinary loop would begin to train it, and a step never."""
    model = mlp()
    model[0].requires_grad_(False)
    step = compiled(model, **program)
    step(X, Y)
    model[0].weight.requires_grad_(True)
    with refused(step, RuntimeError, "0.weight [8, 4] was unfrozen (requires_grad=True) after", "make a new step"):
        step(X, Y)
    model[0].weight.requires_grad_(False)
    assert works(step)


def test_a_rebound_parameter_that_is_put_back_trains_again(program: dict[str, Any]) -> None:
    model = mlp()
    step = compiled(model, **program)
    step(X, Y)
    place = model[0].weight.data
    model[0].weight.data = torch.zeros(8, 4)
    with pytest.raises(RuntimeError, match="was rebound"):
        step(X, Y)
    model[0].weight.data = place
    assert works(step)


def test_a_step_in_inference_mode_is_refused() -> None:
    step = compiled(mlp(), mode="eager")
    for _ in range(2):  # before it was compiled, and after
        with refused(step, RuntimeError, "inside torch.inference_mode(); call it outside"), torch.inference_mode():
            step(X, Y)
        assert works(step)


def test_a_step_with_the_model_in_eval_mode_is_refused() -> None:
    model = mlp()
    step = compiled(model, mode="eager")
    for _ in range(2):
        model.eval()
        with refused(step, RuntimeError, "the model is in eval mode", "call model.train() before the step"):
            step(X, Y)
        model.train()
        assert works(step)


def test_what_would_make_dynamo_compile_again_is_refused_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    step = compiled(model)
    step(X, Y)
    with refused(step, RuntimeError, "autocast", "Call with the same setting"), torch.autocast("cpu", torch.bfloat16):
        step(X, Y)
    model[1].eval()
    with refused(step, RuntimeError, ".training was True", "is False now", "step.recapture()"):
        step(X, Y)
    model[1].train()
    assert works(step) and len(step.programs) == 1


def test_a_buffer_of_another_shape_is_refused_and_one_of_the_same_taken_over(program: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    step = compiled(model, **program)
    step(X, Y)
    kept = model[1].running_mean
    model[1].running_mean = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"buffer 1.running_mean was replaced by torch.float32 \[3\] on cpu"):
        step(X, Y)
    model[1].running_mean = torch.full((2,), 5.0)
    step(X, Y)
    assert model[1].running_mean is kept
    torch.testing.assert_close(
        kept, torch.full((2,), 4.5) + 0.1 * F.linear(X, *before_step(step)).mean(0), rtol=0.1, atol=0.1
    )


def before_step(step: fc.TrainingStep) -> tuple[Tensor, Tensor]:
    """Weight and bias now: one step of 1e-3 from those the forward used, well within the tolerance."""
    return step.model.get_parameter("0.weight").detach(), step.model.get_parameter("0.bias").detach()


def test_of_many_parameters_a_transposed_one_is_found_within_some_calls_and_before_a_save() -> None:
    # Its memory is the same, so the program, which knows the banks alone, is right until then.
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    step = compiled(model, lambda m, x: m(x).square().mean(), mode="eager")
    x = torch.ones(3, 2)
    step(x)
    last = model.get_parameter("19.weight")
    last.data = last.detach().t()
    with pytest.raises(RuntimeError, match=r"19\.weight \[2, 2\] was rebound"):
        step.state_dict()

    def three_steps() -> None:  # 40 parameters, 16 at a call
        for _ in range(3):
            step(x)

    with pytest.raises(RuntimeError, match=r"19\.weight \[2, 2\] was rebound"):
        three_steps()
