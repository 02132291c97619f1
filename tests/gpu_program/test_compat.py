"""What keeps a machine from writing a GPU's program is said before anything is tried."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fusion_compile._gpu_program import _compat


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_remedy_is_said() -> None:
    assert "pip install --no-deps triton==" in _compat.why_not()
    with pytest.raises(RuntimeError, match="Triton is not installed"), _compat.pretended(_compat.H100):
        pass


def test_a_name_that_torch_has_moved_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    known = _compat._replacements(_compat.H100)
    assert len(known) < 30, "patch nothing more than needed"
    moved = [*known, (torch.cuda, "not_there_any_more", None)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_compat, "_replacements", lambda gpu: known)
    assert _compat.why_not() == "", "torch has all of them"
    monkeypatch.setattr(_compat, "_replacements", lambda gpu: moved)
    assert "has moved torch.cuda.not_there_any_more;" in _compat.why_not()


def test_the_architectures_are_tritons_numbers() -> None:
    assert _compat.H100.architecture == 90 and set(_compat.ARCHITECTURES) == {80, 90, 100}
