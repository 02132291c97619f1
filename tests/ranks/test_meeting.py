"""Tests: what one rank does otherwise stops all of them with the same sentence, and nobody hangs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import programs as P
from tests.several_processes import on_ranks, said_by


def both(two_ranks: Any, name: str, key: str | None = None) -> str:
    """The sentence of a scenario, which both ranks say."""
    one, other = (seen if key is None else seen[key] for seen in two_ranks(name))
    assert one == other
    return str(one)


def test_a_batch_that_one_rank_refuses(two_ranks: Any) -> None:
    said = both(two_ranks, "refusals", "said")
    assert said.startswith("ValueError: rank 1 of 2 refuses, and no rank goes on: batch[0] [4, 8] requires a gradient")
    assert all(seen["unchanged"] and seen["step"] == 2 for seen in two_ranks("refusals"))


def test_a_loss_that_raises_on_one_rank(two_ranks: Any) -> None:
    assert both(two_ranks, "loss_that_raises", "said") == (
        "ValueError: rank 1 of 2 refuses, and no rank goes on: an outlier"
    )
    assert two_ranks("loss_that_raises")[1]["step"] == 2


def test_a_number_and_a_schedule_of_one_rank(two_ranks: Any) -> None:
    expected = "ValueError: hyperparameter 'lr' is 0.001 on rank 0 and 0.002 on rank 1, so no step was taken."
    for key in ("apart", "schedule"):
        assert both(two_ranks, "numbers", key).startswith(expected)
    assert all(seen["same"] and seen["step"] == 2 for seen in two_ranks("numbers"))


def test_weights_that_one_rank_writes(two_ranks: Any) -> None:
    assert both(two_ranks, "writes", "alike") == ""
    said = both(two_ranks, "writes", "apart")
    assert "somebody wrote first.weight between steps, and it is another on rank 1 than on rank 0" in said
    assert all(seen["same"] for seen in two_ranks("writes"))


def test_a_rank_that_evaluates_alone_is_served(two_ranks: Any) -> None:
    assert two_ranks("other_acts")[0]["evaluated"] > 0


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("saves alone", "ValueError: rank 0 saves while rank 1 takes a step, so no rank does either."),
        ("loads alone", "ValueError: rank 0 loads a state while rank 1 takes a step, so no rank does either."),
        ("released", "RuntimeError: rank 0 of 2 refuses, and no rank goes on: this training step was released"),
    ],
)
def test_a_rank_that_does_something_else(two_ranks: Any, key: str, sentence: str) -> None:
    assert both(two_ranks, "other_acts", key).startswith(sentence)
    assert both(two_ranks, "other_acts", "goes on") == ""


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("depth", "the model has blocks.5.n.weight nowhere on rank 0"),
        ("accumulate", "the step was given accumulate 1 on rank 0 and 2 on rank 1"),
        ("bad option", "rank 1 of 2 refuses, and no rank goes on: half_precision='none' is not known"),
        ("bad on all", "ValueError: half_precision='none' is not known"),
        ("without mesh", "without mesh= a step does not average gradients over them"),
        ("integer buffer", "the loss changes the buffer seen [4] torch.int64"),
    ],
)
def test_steps_that_are_made_otherwise(two_ranks: Any, key: str, sentence: str) -> None:
    assert sentence in both(two_ranks, "made_otherwise", key)


def test_another_metric_on_one_rank(two_ranks: Any) -> None:
    assert both(two_ranks, "other_programs").startswith(
        "ValueError: the ranks would run different programs, so none ran: rank 0 sends nothing more, rank 1 sends extra"
    )


@pytest.mark.exhaustive
def test_a_loss_that_one_rank_cannot_read(two_ranks: Any) -> None:
    said = both(two_ranks, "unreadable_on_one")
    assert said.startswith("ValueError: rank 1 of 2 refuses, and no rank goes on: ") and "on the host" in said


@pytest.mark.exhaustive
def test_a_captured_loss_that_communicates_itself(two_ranks: Any) -> None:
    assert "the loss itself communicates (3 collectives instead of 2)" in both(two_ranks, "talks@captured")


@pytest.mark.exhaustive
def test_captured_steps_refuse_alike(two_ranks: Any) -> None:
    assert "batch[0] [4, 8] requires a gradient" in both(two_ranks, "refusals@captured", "said")
    assert "rank 1 sends all_gather_into_tensor of [4]" in both(two_ranks, "other_programs@captured")
    assert "its loss is another" in both(two_ranks, "proof_fails_on_one@captured")


def test_a_loss_that_communicates_itself(two_ranks: Any) -> None:
    assert "the loss itself communicates (c10d.allreduce_.default)" in both(two_ranks, "talks")


def fails_after_the_meeting(rank: int, world: int, folder: str) -> None:
    from fusion_compile._step import across_ranks

    def fails(*given: Any) -> Any:
        raise RuntimeError("out of memory")

    step = P.step_of("adamw", P.mesh_of(world))
    good = P.part(P.whole_batches(1)[0], rank, world)
    step(*good)
    if rank == 1:
        changed: Any = across_ranks
        changed.of_every_rank = fails
    Path(folder, str(rank)).write_text(said_by(lambda: step(*good)))
    if rank == 1:
        os._exit(5)  # as Python does at an error that nobody catches


def test_the_others_are_told_what_one_failed_of_in_the_middle(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\[rank 1 of 2\] died without a word, with exit code 5"):
        on_ranks(2, fails_after_the_meeting, str(tmp_path))
    assert (tmp_path / "1").read_text() == "RuntimeError: out of memory"
    said = (tmp_path / "0").read_text()
    assert said.startswith("RuntimeError: rank 1: RuntimeError: out of memory, and this rank waited for it")
