"""What keeps a machine from writing a GPU's program is said before anything is tried."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from fusion_compile._compat import fast_product_dtype
from fusion_compile._gpu_program import _compat
from fusion_compile.passes import exchange_rates, hoist_time_conditioning


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


@pytest.mark.parametrize("fast", [True, False])
def test_a_capture_for_a_gpu_asks_the_gpu_and_not_the_cpu(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bf16 multiplies in fp32, and a launch on it costs less than on a GPU."""
    monkeypatch.setattr("fusion_compile._compat.cpu_multiplies_bf16", lambda: fast)
    own = torch.bfloat16 if fast else torch.float32
    hoisting, cpu = sys.modules[hoist_time_conditioning.__module__], torch.device("cpu")
    assert fast_product_dtype("cpu") == own and hoisting.exchange_rates(cpu) == exchange_rates(cpu)
    with _compat.captured_for(_compat.H100):
        assert fast_product_dtype("cpu") == torch.bfloat16
        assert hoisting.exchange_rates(cpu) == exchange_rates(torch.device("cuda")) != exchange_rates(cpu)
    assert fast_product_dtype("cpu") == own
    v100 = _compat.H100._replace(major=7)
    with _compat.captured_for(v100):
        assert fast_product_dtype("cpu") == torch.float32
