"""Tests: means over ranks are those over the batches laid together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import programs as P
from tests.ranks.conftest import assert_equal_to_one
from tests.ranks.conftest import one_process as one_process
from tests.ranks.conftest import two_ranks as two_ranks
from tests.ranks.scenarios import counted


def test_batches_of_different_sizes_weigh_by_their_entries(two_ranks: Any, one_process: Any) -> None:
    one = one_process("adamw", 1)
    numbers = one["losses"][0], one["metrics"]["grad_norm"], one["metrics"]["mae"]
    assert all(seen == pytest.approx(numbers, abs=1e-6) for seen in two_ranks("uneven"))  # the order of additions


def test_a_count_of_the_loss_weighs_and_is_summed(two_ranks: Any) -> None:
    (x, y), *_ = P.whole_batches(1)
    step = P.step_of("adamw", loss=counted, weigh_by="tokens")
    loss = float(step(x, y, torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 1])))
    for seen in two_ranks("weighed"):
        assert seen["tokens"] == 5
        assert [seen["loss"], seen["grad_norm"]] == pytest.approx([loss, float(step.metrics["grad_norm"])], abs=1e-6)


@pytest.mark.parametrize("form", ["replicate", "optimizer"])
def test_what_is_not_finite_on_one_rank_skips_on_all(two_ranks: Any, form: str) -> None:
    for seen in two_ranks("not_finite"):
        assert seen[form] == {"unchanged": True, "skipped": 1, "same": True, "step": 2}


def test_changed_buffers_are_means_over_ranks(two_ranks: Any) -> None:
    assert two_ranks("buffers") == [{"mean": True, "same": True, "batches": 1}] * 2


def test_kept_gradients_and_averages_are_whole_on_every_rank(two_ranks: Any) -> None:
    import fusion_compile as fc

    model = P.net(0)
    ema = fc.EMA(model, decay=0.5)
    step = P.step_of("muon", model=model, keep_gradients=True, ema=ema)
    for batch in P.whole_batches(2):
        step(*batch)
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    for seen in two_ranks("gradients_and_averages"):
        assert float((seen["gradient"] - gradient).abs().max()) <= 1e-6  # the order of additions
        assert float((seen["average"] - P.flat(ema.model)).abs().max()) <= 2e-6


@pytest.mark.exhaustive
def test_captured_steps_weigh_alike_and_reduce_once(two_ranks: Any, one_process: Any) -> None:
    one = one_process("adamw", 1)
    numbers = one["losses"][0], one["metrics"]["grad_norm"], one["metrics"]["mae"]
    assert all(seen == pytest.approx(numbers, abs=1e-6) for seen in two_ranks("uneven@captured"))
    for seen in two_ranks("accumulated"):
        assert_equal_to_one(seen, one_process("muon", 2))
        assert len(seen["collectives"]) == 9  # as many as without micro-batches
    for seen in two_ranks("reduced_in_bf16"):
        assert seen["same"]
        assert seen["losses"] == pytest.approx(one_process("adamw", 2)["losses"], rel=1e-3)  # bf16 has 8 bits


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["master", "exact", "kahan", "stochastic"])
def test_half_precision_is_the_same_divided_and_replicated(two_ranks: Any, form: str) -> None:
    for seen in two_ranks("half_precision"):
        one, other = seen[form, "replicate"], seen[form, "optimizer"]
        assert one["same"] and other["same"]
        assert float((one["weights"] - other["weights"]).float().abs().max()) <= 2**-8  # a step of bf16 at 1
