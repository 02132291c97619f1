"""torch's settings that decide what is computed."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._capture.watch import torch_settings
from fusion_compile._capture.watch.torch_settings import SlowSettings, TorchSettings


def changed(before: list[object], settings: TorchSettings) -> list[str]:
    return [n for n, a, b in zip(settings.fast, before, settings.read_fast(), strict=True) if a != b]


def test_what_people_change_around_single_calls() -> None:
    settings = TorchSettings()
    before = settings.read_fast()
    assert changed(before, settings) == []
    with torch.no_grad():
        assert changed(before, settings) == ["torch.is_grad_enabled()"]
    with torch.autocast("cpu", dtype=torch.float16):
        assert changed(before, settings) == ["torch.is_autocast_enabled('cpu')", "torch.get_autocast_dtype('cpu')"]
    with torch.inference_mode():
        assert changed(before, settings) == ["torch.is_grad_enabled()", "torch.is_inference_mode_enabled()"]
    torch.set_default_dtype(torch.float64)
    try:
        assert changed(before, settings) == ["torch.get_default_dtype()"]
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_people_set_once() -> None:
    lots = [SlowSettings(readers) for readers in TorchSettings().slow_lots()]
    assert all(lot.is_as_it_was() for lot in lots)
    torch.backends.cudnn.deterministic = True
    try:
        assert [d for lot in lots for d in lot.differences()] == [("torch.backends.cudnn.deterministic", False, True)]
        assert sum(not lot.is_as_it_was() for lot in lots) == 1
    finally:
        torch.backends.cudnn.deterministic = False


def test_every_setting_is_in_one_lot() -> None:
    settings = TorchSettings()
    assert [name for lot in settings.slow_lots() for name in lot] == list(settings.slow)
    assert len(settings.slow) > 10


def test_a_setting_that_torch_refuses_to_read_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise RuntimeError("mix of the legacy and new APIs")

    assert torch_settings._or_unreadable(refuses) == "unreadable"
    assert torch_settings._or_unreadable(lambda: 3) == 3
