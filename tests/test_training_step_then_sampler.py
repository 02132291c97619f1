"""A model that is trained and sampled in one process: the two halves of the package share its parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from examples.dit import DiT


def flow_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    t, e = torch.rand(len(x)), torch.randn_like(x)
    s = t[:, None, None, None]
    return F.mse_loss(model((1 - s) * x + s * e, t, y), e - x)


def trained() -> tuple[fc.TrainingStep, DiT, Tensor, Tensor]:
    model = DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=128, depth=1, num_heads=2)
    for p in model.parameters():  # adaLN-zero would hide a stale table
        nn.init.normal_(p, std=0.02)
    step = fc.compile_training_step(model, flow_loss, mode="default", backend="aot_eager")
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4)
    step(x, y)
    return step, model, x, y


def difference(sampler: nn.Module, model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (sampler(x, t, y) - model(x, t, y)).abs().max().item()


def test_a_sampler_never_serves_a_table_from_before_a_training_step() -> None:
    step, model, x, y = trained()
    sampler = fc.optimize_sampler(model.eval(), 4, example_inputs=(x, torch.ones(4), y), mode="eager")
    for i, t in enumerate(sampler.timesteps):
        assert difference(sampler, model, x, t.expand(4).clone(), y) == 0
        if i == 1:  # in the middle of a schedule
            model.train()
            step(x, y)
            model.eval()


def test_a_released_step_gives_the_model_its_own_memory_and_refuses_to_run() -> None:
    step, model, x, y = trained()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert step.release() is model
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(before)
    assert all(p.untyped_storage().resizable() for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    try:
        step(x, y)
    except RuntimeError as error:
        assert "released" in str(error)
    else:
        raise AssertionError("a released step ran")


def test_a_released_step_refuses_everything_that_needs_its_state(tmp_path: Path) -> None:
    step, model, x, y = trained()
    saved = step.state_dict()
    step.save(tmp_path / "before")
    step.release()
    after = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    uses: list[Callable[[], Any]] = [
        lambda: step(x, y),
        lambda: step.metrics,
        step.state_dict,
        step.gradient_point,
        step.explain,
        lambda: fc.explain(step),
        lambda: fc.explain(step, (x, y)),
        lambda: step.save(tmp_path / "after"),
        lambda: step.load(tmp_path / "before"),
        lambda: step.load_state_dict(saved),
        lambda: step.warm_start(saved),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"^this training step was released and has no state any more; "):
            use()
    assert not (tmp_path / "after").exists()
    assert step.release() is model and "TrainingStep(" in repr(step)
    for name, p in model.named_parameters():
        assert p.data_ptr() == after[name][0] and torch.equal(p, after[name][1])


def test_memory_of_a_training_step_is_not_reported_as_freed() -> None:
    step, model, x, y = trained()
    sampler = fc.optimize_sampler(model.eval(), 4, example_inputs=(x, torch.ones(4), y), mode="eager")
    try:
        with torch.no_grad():
            freed = sampler.release_weights(to="drop")
    except UserWarning as said:  # warnings are errors here
        assert "step.release()" in str(said)
    else:
        raise AssertionError(f"{freed} bytes were called free while the banks hold them")
    step.release()
    assert (
        fc.optimize_sampler(model, 4, example_inputs=(x, torch.ones(4), y), mode="eager").release_weights(to="drop") > 0
    )
