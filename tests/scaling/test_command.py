"""Tests: what the command prints, and what it refuses in one sentence."""

from __future__ import annotations

import pytest

from fusion_compile._scaling.command import run


def test_tables_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--model", "dit-xl", "--gpus", "8", "1024", "--bandwidth", "450"]) == 0
    said = capsys.readouterr().out
    assert "dit-xl: 0.669 B entries in 140 matrices" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["8", "94", "10", "7.8", "10", "1.3", "50", "6.3"] in rows
    assert ["8", "12", "5.0", "1.5"] in rows
    assert "Assumed: 450 GB/s a GPU and direction" in said
    assert "no forecast" in said


def test_a_model_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--hidden", "1152", "--depth", "28", "--tokens", "1024", "--gpus", "2", "--gradient-bytes", "2"]) == 0
    said = capsys.readouterr().out
    assert "a DiT of width 1152: 0.669 B entries" in said
    assert "of 4 samples of 1024 tokens" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "gpt"], "--model gpt is not known; use one of dit-b, dit-l"),
        (["--hidden", "8"], "--hidden and --depth belong together"),
        (["--gpus", "0"], "--gpus 0 is 0; give a number above 0."),
        (["--bandwidth", "nan"], "--bandwidth is nan"),
        (["--batch", "-3"], "--batch is -3"),
    ],
)
def test_what_cannot_be_served(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    assert says in capsys.readouterr().err
