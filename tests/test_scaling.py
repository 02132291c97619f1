"""Tests: ``python -m fusion_compile.scaling`` is a command."""

from __future__ import annotations

import runpy
import sys

import pytest

from fusion_compile.scaling import main


def test_the_module_runs_as_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling", "--model", "dit-b", "--gpus", "8"])
    monkeypatch.delitem(sys.modules, "fusion_compile.scaling", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fusion_compile.scaling", run_name="__main__")
    assert ended.value.code == 0
    assert "dit-b: 0.127 B entries" in capsys.readouterr().out
    assert main(["--model", "nothing"]) == 2
