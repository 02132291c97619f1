"""Tests of the tests' processes: a case that fails, dies or hangs says so, and the next one has others."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests import several_processes
from tests.several_processes import on_ranks


def adds_up(rank: int, world: int, given: float) -> float:
    total = torch.tensor([given + rank])
    dist.all_reduce(total)
    return total.item()


def raises(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("an outlier")
    dist.all_reduce(torch.zeros(1))  # in which the other one never comes


def ends(rank: int, world: int) -> None:
    os._exit(7)


def sleeps_for_ever(rank: int, world: int) -> None:
    time.sleep(1e6)


def pid(rank: int, world: int) -> int:
    return os.getpid()


def test_cases_share_their_processes_until_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several_processes, "_SAYS_WHY", 0.3)
    monkeypatch.setattr(several_processes, "_teams", {})
    assert on_ranks(2, adds_up, 0.5) == [2.0, 2.0]
    before = on_ranks(2, pid)
    assert on_ranks(2, pid) == before
    with pytest.raises(AssertionError) as said:
        on_ranks(2, raises)
    assert "raises\n[rank 0 of 2] has not ended; it is at\n" in str(said.value)
    assert "[rank 1 of 2] Traceback" in str(said.value) and "ValueError: an outlier" in str(said.value)
    after = on_ranks(2, pid)
    assert not {*after} & {*before}
    several_processes._teams.pop(2).end()


def test_a_case_that_dies_or_hangs_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"\[rank 0 of 1\] died without a word, with exit code 7"):
        on_ranks(1, ends)
    monkeypatch.setattr(several_processes, "HANGS_AFTER", 1.5)
    with pytest.raises(AssertionError, match=r"(?s)\[rank 0 of 1\] has not ended; it is at.* in sleeps_for_ever"):
        on_ranks(1, sleeps_for_ever)
