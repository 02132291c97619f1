"""`warm_start`: weights and what both recipes keep go over; the rest begins from the loaded weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_compile import TrainingStep, compile_training_step, optim
from fusion_compile.optim import Transform
from tests.data.bowl import Bowl, loss_fn, noise


def trained(optimizer: str | Transform, steps: int = 5) -> TrainingStep:
    step = compile_training_step(Bowl(), loss_fn, optimizer=optimizer, mode="eager")
    for i in range(steps):
        step(*noise(i))
    return step


def test_from_sf_normuon_to_the_same_recipe_everything_is_carried_and_training_goes_on_as_it_would(
    tmp_path: Path,
) -> None:
    first = trained("sf_normuon")
    first.save(tmp_path / "ck")
    second = compile_training_step(Bowl(seed=3), loss_fn, optimizer="sf_normuon", mode="eager")
    report = second.warm_start(tmp_path / "ck")
    assert report.fresh == () and report.unused == ()
    assert second.steps_called == 0
    bowl = Bowl()  # the second problem's own target lies in buffers, which the checkpoint brought along
    assert torch.equal(second.model.get_buffer("t_tall"), bowl.get_buffer("t_tall"))
    for i in range(5, 8):
        first(*noise(i))
        second(*noise(i))
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_into_another_recipe_momenta_and_z_go_over_by_what_they_are() -> None:
    first = trained(optim.muon())
    second = compile_training_step(Bowl(seed=3), loss_fn, optimizer=optim.sf_normuon(), mode="eager")
    report = second.warm_start(first.state_dict())
    assert {"mu.tall", "mu.wide", "mu.square"} <= set(report.carried)
    assert {"nu.table", "nu.bias", "nu.gain", "beta2_power"} <= set(report.carried)
    assert {"mu.table", "beta1_power"} <= set(report.unused)  # AdamW's first moment; Schedule-Free has none
    assert {"z.tall", "nu.tall", "weight_sum"} <= set(report.fresh)
    state = second.state_dict()
    for name, weight in first.model.named_parameters():
        role = "spectral" if name in ("tall", "wide", "square") else "scalar"
        assert torch.equal(state["optimizer"][f"{role}.z.{name}"], weight), "z begins at the loaded weights"
    assert "carried mu, nu, beta2_power" in str(report) and "; fresh: " in str(report)
    assert torch.equal(
        state["optimizer"]["spectral.base.0.mu.tall"], first.state_dict()["optimizer"]["spectral.0.mu.tall"]
    )


def test_a_part_goes_over_whole_or_not_at_all() -> None:
    """Adam's powers of β without all of its moments would correct for a past that the fresh ones never had: the first
    step would be many times lr."""
    first = trained("sf_normuon", steps=20)
    second = compile_training_step(Bowl(seed=3), loss_fn, optimizer=optim.adamw(1e-3, weight_decay=0.0), mode="eager")
    report = second.warm_start(first.state_dict())
    assert not {"beta1_power", "beta2_power", "nu.table", "mu.tall"} & set(report.carried)
    before = {n: p.detach().clone() for n, p in second.model.named_parameters()}
    second(*noise(20))
    for name, p in second.model.named_parameters():
        assert float((p.detach() - before[name]).abs().max()) <= 1.001e-3, name  # lr, and a rounding


def test_the_full_recipe_takes_z_averages_and_momenta_from_sf_normuon() -> None:
    first = trained("sf_normuon")
    second = compile_training_step(Bowl(seed=3), loss_fn, optimizer="full_fusion", mode="eager")
    report = second.warm_start(first.state_dict())
    every = ("tall", "wide", "square", "table", "bias", "gain")
    assert {f"z.{n}" for n in every} | {"weight_sum", "lr_max"} <= set(report.carried)
    assert {f"{f}.{n}" for f in ("mu", "nu") for n in ("tall", "wide", "square")} <= set(report.carried)
    assert {"nu.table", "beta2_power"} <= set(report.carried) and report.unused == ()
    assert {"left.tall", "started"} <= set(report.fresh)


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing() -> None:
    step = trained("sf_normuon")
    before = step.state_dict()
    saved = trained("adamw").state_dict()
    saved["model"]["tall"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"mismatched model tall: \[3, 3\] in the checkpoint, \[192, 128\] here"):
        step.warm_start(saved)
    after = step.state_dict()
    assert all(torch.equal(after["optimizer"][k], t) for k, t in before["optimizer"].items())
    assert all(torch.equal(after["model"][k], t) for k, t in before["model"].items())


def test_bf16_parameters_keep_the_saved_masters() -> None:
    first = compile_training_step(Bowl().bfloat16(), loss_fn, optimizer="adamw", mode="eager")
    batches = [tuple(n.bfloat16() for n in noise(i)) for i in range(3)]
    first(*batches[0])
    second = compile_training_step(Bowl(seed=3).bfloat16(), loss_fn, optimizer="sf_adamw", mode="eager")
    report = second.warm_start(first.state_dict())
    assert "master.tall" in report.carried
    assert torch.equal(second.state_dict()["optimizer"]["master.tall"], first.state_dict()["optimizer"]["master.tall"])


def test_groups_with_rates_of_their_own_go_over_by_the_parameters_that_they_hold() -> None:
    """lr_max has one value for each group, so that no value was the checkpoint's one, and z began again everywhere."""
    groups = [{"params": ["^gain$"], "lr": 1e-2, "name": "gains"}]

    def made(groups: Sequence[dict[str, Any]], seed: int = 0) -> TrainingStep:
        return compile_training_step(Bowl(seed=seed), loss_fn, optimizer="sf_normuon", groups=groups, mode="eager")

    first = made(groups)
    for i in range(5):
        first(*noise(i))
    second = made(groups, seed=3)
    report = second.warm_start(first.state_dict())
    assert report.fresh == () and report.unused == ()
    own, others = second.state_dict()["optimizer"], first.state_dict()["optimizer"]
    assert own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)

    # Without groups one lr_max would have to be two numbers. Matrices have the default one, vectors start again.
    third = made([], seed=3)
    report = third.warm_start(first.state_dict())
    assert "z.square" in report.carried and "z.gain" in report.fresh and "z.gain" in report.unused
    state = third.state_dict()["optimizer"]
    assert torch.equal(state["spectral.lr_max"], others["default.spectral.lr_max"])
    assert torch.equal(state["scalar.z.gain"], third.model.get_parameter("gain")) and float(state["scalar.lr_max"]) == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [(3, "is a int"), ({}, "lacks model, optimizer"), ({"model": {}}, "lacks optimizer")],
)
def test_what_is_no_checkpoint_is_refused_before_anything_is_loaded(source: Any, words: str) -> None:
    step = trained("adamw", steps=1)
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    with pytest.raises((TypeError, ValueError), match=words):
        step.warm_start(source)
    assert all(torch.equal(p, before[n]) for n, p in step.model.named_parameters())
