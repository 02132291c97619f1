"""Example calls of diffusers' transformers, and a package that runs without diffusers."""

from __future__ import annotations

import builtins
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_compile._sampler.without_weights.command import explain_sampler
from fusion_compile._sampler.without_weights.diffusers_calls import example_call, example_schedule, known_classes
from tests.models.tiny import TINY, tiny_model


def test_every_class_with_an_example_has_a_tiny_model() -> None:
    assert set(known_classes()) == {tiny.class_name for tiny in TINY.values()}


def test_the_package_runs_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a test's dependency, never a user's: no module of ours imports it when it is itself imported."""
    imported: list[str] = []
    original = builtins.__import__

    def watching(name: str, *rest: Any) -> Any:
        imported.append(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", watching)
    import fusion_compile._sampler.without_weights.command
    import fusion_compile._sampler.without_weights.diffusers_arguments
    import fusion_compile._sampler.without_weights.diffusers_calls

    for module in (
        fusion_compile._sampler.without_weights.diffusers_arguments,
        fusion_compile._sampler.without_weights.diffusers_calls,
        fusion_compile._sampler.without_weights.command,
    ):
        importlib.reload(module)
    assert imported and not any(name.partition(".")[0] == "diffusers" for name in imported)


def test_a_class_without_example_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": 8}')
    with pytest.raises(ValueError, match=r"no example call is known for UNet2DModel.*module:factory"):
        explain_sampler(str(tmp_path))


def test_schedules_fall_in_the_units_of_their_clock() -> None:
    assert example_schedule("index", 4).tolist() == [999, 749, 500, 250]
    assert example_schedule("thousand", 4).tolist() == [1000.0, 750.0, 500.0, 250.0]
    assert example_schedule("unit", 4).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_an_example_call_is_at_the_middle_of_its_schedule() -> None:
    model = tiny_model("DiT")
    call = example_call(model, 4, TINY["DiT"].sizes)
    assert call.schedule.tolist() == [999, 749, 500, 250] and call.arguments["timestep"].tolist() == [500, 500]
    with torch.no_grad():
        assert model(**call.arguments).sample.shape[0] == 2
