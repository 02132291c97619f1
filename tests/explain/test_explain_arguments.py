"""The arguments of `explain`: the model's own names stay its own, and a wrong call is refused with the right one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fusion_compile as fc


def test_what_cannot_be_explained_is_refused_with_what_can() -> None:
    with pytest.raises(TypeError, match="got a int; give what"):
        fc.explain(3)
    with pytest.raises(TypeError, match="Linear without inputs"):
        fc.explain(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"GraphModule; give its inputs in order, in one tuple"):
        fc.explain(fx.symbolic_trace(nn.ReLU()), (), {"input": torch.ones(2)})
    with pytest.raises(ValueError, match=r"device='abacus' has no published peaks here; use one of h100"):
        fc.explain(nn.ReLU(), (torch.ones(2),), device="abacus")


def test_what_is_read_and_not_run_takes_no_inputs_that_it_would_ignore() -> None:
    x = torch.ones(2)
    program = torch.export.export(nn.ReLU(), (x,))
    for args, kwargs in (((x,), None), ((), {"input": x})):
        with pytest.raises(
            TypeError, match=r"got inputs for an ExportedProgram, .*torch\.compile\(program\.module\(\)\)"
        ):
            fc.explain(program, args, kwargs)
    watched = fc.explain(torch.compile(program.module(), backend="eager"), (x,), backend="eager")
    assert watched.runtime is not None
    traced = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(TypeError, match="got calls for a GraphModule, which is read and not run"):
        fc.explain(traced, (x,), calls=[(x,)])


def test_names_devices_and_explanations_of_another_kind_are_refused() -> None:
    explanation = fc.explain(nn.ReLU(), (torch.ones(2),), run=False)
    with pytest.raises(ValueError, match=r"device=3 has no published peaks here"):
        fc.explain(nn.ReLU(), (torch.ones(2),), device=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"diff\(\) got a str; give another explanation"):
        explanation.diff("before.json")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"why\(\) got a int; give the name of a node"):
        explanation.why(3)  # type: ignore[arg-type]


def test_the_old_form_is_refused_with_the_new_one() -> None:
    x = torch.ones(2)
    with pytest.raises(TypeError, match=r"got a Tensor as args; .*: explain\(model, \(x, y\), \{'mask': mask\}\)"):
        fc.explain(nn.ReLU(), x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got a Tensor as kwargs; .*: explain\(model, \(x, y\), \{'mask': mask\}\)"):
        fc.explain(nn.ReLU(), (x,), x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got calls without args; give the inputs of the first call too"):
        fc.explain(nn.ReLU(), calls=[(x,)])


def test_the_models_own_argument_names_are_its_own() -> None:
    seen = []

    def program(x: Tensor, device: float, *, run: bool, calls: int) -> Tensor:
        seen.append((device, run, calls))
        return x * device

    named = {"run": False, "calls": 3}
    further = [((torch.ones(2), 0.5), {"run": True, "calls": 4})]
    explanation = fc.explain(program, (torch.ones(2), 0.5), named, calls=further, backend="eager")
    assert (0.5, False, 3) in seen and (0.5, True, 4) in seen
    assert explanation.runtime is not None
