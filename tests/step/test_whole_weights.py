"""Tests: where no rank has whole weights, nothing reads what is not there, and all is there inside of `gathered`."""

from __future__ import annotations

import torch

import fusion_compile as fc
from tests.ranks.full_scenarios import of_two


def test_a_parameter_says_what_it_is_and_refuses_to_be_read() -> None:
    for seen in of_two("full_is_not_read"):
        assert seen["shape"] == (16, 16) and seen["numbers"] == 7160
        for act in ("sum", "data", "written", "called", "state_dict", "copied"):
            assert "was read or written between steps" in seen[act] and "with step.gathered():" in seen[act]
        assert seen["sum"].startswith(
            "RuntimeError: blocks.0.a.weight [16, 16] was read or written between steps (by sum"
        )
        assert seen["explained"] == []
        assert "evaluate() with shard='full' outside of `with step.gathered():`" in seen["evaluated"]


def test_inside_of_gathered_the_model_is_whole() -> None:
    for seen in of_two("full_is_not_read"):
        assert seen["in gathered"] and seen["kept stays"]
        assert "takes a step inside of `with step.gathered():`" in seen["step in gathered"]


def test_what_is_written_there_counts_if_all_ranks_write_it() -> None:
    for seen in of_two("full_writes"):
        assert seen["alike"]
        assert "somebody wrote blocks.1.b.weight between steps, and it is another on rank 1" in seen["apart"]


def test_what_is_not_finite_on_one_rank_changes_nothing() -> None:
    assert of_two("full_not_finite") == [{"unchanged": True, "skipped": 1, "step": 2}] * 2


def test_every_form_loads_what_the_others_saved() -> None:
    for seen in of_two("full_saved"):
        for saved, loaded in (("full", "full"), ("full", "optimizer"), ("optimizer", "full")):
            assert seen[saved, loaded, "bits"] and seen[saved, loaded, "goes on"] == 0.0
        assert seen["warm"].startswith("carried mu;")
        assert seen["released"]


def test_what_one_rank_refuses_holds_nobody() -> None:
    for seen in of_two("full_refusals"):
        assert "rank 1 of 2 refuses, and no rank goes on: an outlier" in seen["raises"]
        assert "rank 0 gathers its weights while rank 1 takes a step" in seen["alone"]
        assert "ema= with shard='full'" in seen["ema"]
        assert "keep_gradients= with shard='full'" in seen["gradients"]
        assert "shard='full' with prodigy: " in seen["pools"]


def test_on_one_process_the_model_is_whole_anyway() -> None:
    model = torch.nn.Linear(4, 2)
    step = fc.compile_training_step(model, lambda model, x: model(x).square().mean(), mode="eager")
    with step.gathered() as found:
        assert found is model
        before = model.weight.clone()
    step(torch.ones(3, 4))
    assert not torch.equal(model.weight, before)
