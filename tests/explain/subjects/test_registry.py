"""Objects that explain themselves are known by their registered type, not by having a method of that name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.explain._subjects import registry
from fusion_compile.explain._subjects.registry import Subject, register, subject_of
from fusion_compile.sampler import Sampler


def test_the_doors_register_steps_and_samplers() -> None:
    step = fc.compile_training_step(nn.Linear(2, 2), lambda m, x: m(x).sum(), optimizer="adamw", mode="eager")
    subject = subject_of(step)
    assert subject is not None and subject is registry._SUBJECTS[fc.TrainingStep]
    assert not subject.is_compiled(step) and subject.state is not None and subject.restore is not None
    assert Sampler in registry._SUBJECTS


def test_a_subclass_is_treated_as_its_nearest_registered_base(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base: ...

    class Below(Base): ...

    class Lowest(Below): ...

    explanation = fc.explain(torch.export.export(nn.ReLU(), (torch.ones(2),), strict=False))
    monkeypatch.setattr(registry, "_SUBJECTS", {})
    base: Subject[Any] = Subject(lambda obj, device: explanation)
    below: Subject[Any] = Subject(lambda obj, device: explanation)
    register(Base, base)
    assert subject_of(Lowest()) is base and subject_of(object()) is None
    register(Below, below)
    assert subject_of(Lowest()) is below and subject_of(Base()) is base
    assert fc.explain(Lowest()) is explanation


def test_a_users_module_with_a_method_called_explain_is_a_module() -> None:
    class Explains(nn.Module):
        def explain(self) -> str:
            return "something else"

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    explanation = fc.explain(Explains(), (torch.ones(2),), backend="eager")
    assert explanation.kind == "callable" and len(explanation.graphs) == 1
