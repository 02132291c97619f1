"""Progress is shown to a person at a terminal, and to nobody else."""

from __future__ import annotations

import re
import sys

import pytest

from fusion_compile._progress import following, stage


def test_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("compiling"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_the_stage_and_its_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("FUSION_COMPILE_PROGRESS", raising=False)
    with stage("compiling"):
        pass
    out, err = capsys.readouterr()
    assert out == "" and re.search(r"fusion_compile: compiling: \d+\.\d s", err)
    monkeypatch.setenv("FUSION_COMPILE_PROGRESS", "0")
    with stage("compiling"):
        pass
    assert capsys.readouterr() == ("", "")


def test_an_error_inside_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError, match="mine"), stage("compiling"):
        raise KeyError("mine")


def test_items_are_followed_by_a_bar_at_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(following("abc", 3, "evaluating")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("FUSION_COMPILE_PROGRESS", raising=False)
    assert list(following("abc", 3, "evaluating")) == ["a", "b", "c"]
    assert "fusion_compile: evaluating" in capsys.readouterr().err
