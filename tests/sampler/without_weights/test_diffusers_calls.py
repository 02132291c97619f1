"""Example calls of diffusers' transformers, and a package that runs without diffusers."""

from __future__ import annotations

import builtins
import importlib
from pathlib import Path
from typing import Any

import pytest

from fusion_compile._sampler.without_weights.command import explain_sampler
from fusion_compile._sampler.without_weights.diffusers_calls import known_classes
from tests.models.tiny import TINY


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
