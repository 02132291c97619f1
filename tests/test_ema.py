"""`EMA`: kept by the step, right after every kind of step, and readable everywhere, the loss included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers.training_utils
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc

MODES: dict[str, dict[str, Any]] = {"eager": {"mode": "eager"}, "captured": {"backend": "aot_eager"}}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    # No bias before the normalization: its gradient is zero but for rounding, along which AdamW moves.
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def batch(seed: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def made(**options: Any) -> tuple[fc.TrainingStep, fc.EMA]:
    model = mlp()
    ema = fc.EMA(model, 0.9)
    return fc.compile_training_step(model, squares, ema=ema, lr=1e-2, **options), ema


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", ["adamw", "sf_normuon"])
def test_it_averages_the_deployed_weights_and_a_skipped_step_leaves_it(recipe: str, mode: str) -> None:
    step, ema = made(optimizer=recipe, **MODES[mode])
    want = values(step.model)
    for seed in range(4):
        step(batch(seed) if seed != 2 else torch.full((8, 4), torch.nan))
        if seed != 2:
            want = {n: 0.9 * want[n] + 0.1 * p for n, p in values(step.model).items()}
        # Two roundings of values below 1.
        torch.testing.assert_close(values(ema.model), want, rtol=0, atol=3e-7)
    assert int(step.metrics["skipped"]) == 1


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", sorted(fc.optim.RECIPES))
def test_of_every_recipe_it_follows_the_deployed_weights_and_is_resumed_bitwise(recipe: str) -> None:
    """500 steps of the average itself are compared in tests/optim/test_averaged.py; here the recipe is the question."""

    def run(step: fc.TrainingStep, seeds: range) -> list[dict[str, Tensor]]:
        seen = []
        for seed in seeds:
            step(batch(seed) if seed != 2 else torch.full((8, 4), torch.nan))
            seen.append(values(step.model))
        return seen

    def new() -> tuple[fc.TrainingStep, fc.EMA]:
        model = mlp()
        ema = fc.EMA(model, 0.9)
        return fc.compile_training_step(model, squares, optimizer=recipe, ema=ema, mode="eager"), ema

    step, ema = new()
    want = values(step.model)
    for n, weights in enumerate(run(step, range(4))):
        want = want if n == 2 else {name: 0.9 * want[name] + 0.1 * p for name, p in weights.items()}
    # Two roundings in each of three steps, of values below 1.
    torch.testing.assert_close(values(ema.model), want, rtol=0, atol=1e-6)
    saved = step.state_dict()
    run(step, range(4, 7))
    again, other = new()
    again.load_state_dict(saved)
    run(again, range(4, 7))
    for name, value in values(ema.model).items():
        assert torch.equal(value, other.model.get_parameter(name))


def test_a_resumed_run_has_it_bitwise(tmp_path: Path) -> None:
    step, ema = made(optimizer="adamw", mode="eager")
    [step(batch(seed)) for seed in range(2)]
    step.save(tmp_path / "ck")
    [step(batch(seed)) for seed in range(2, 4)]
    again, other = made(optimizer="adamw", mode="eager")
    again.load(tmp_path / "ck")
    [again(batch(seed)) for seed in range(2, 4)]
    for name, value in values(ema.model).items():
        assert torch.equal(value, other.model.get_parameter(name))


def test_its_rate_is_live() -> None:
    step, ema = made(optimizer="adamw", mode="eager")
    step(batch(0))
    step.hyperparameters["ema_rate"] = 1.0
    step(batch(1))
    for name, value in values(step.model).items():
        # a + 1 (x - a) rounds twice.
        torch.testing.assert_close(ema.model.get_parameter(name), value, rtol=0, atol=1e-7)


def test_several_have_names_and_groups_change_nothing() -> None:
    model = mlp()
    averages = [fc.EMA(model, 0.9), fc.EMA(model, 0.5, name="fast"), *fc.EMA.power(model, 0.1)]
    step = fc.compile_training_step(
        model, squares, optimizer="adamw", ema=averages, groups=[fc.no_decay(model)], mode="eager"
    )
    start = values(model)["0.weight"]
    step(batch(0))
    moved = values(model)["0.weight"] - start
    with pytest.raises(ValueError, match="fast_ema_rate"):
        step.hyperparameters["fast_ema_rate"] = 1.5
    for ema, share in zip(averages, (0.1, 0.5, 1.0), strict=True):
        found = ema.model.get_parameter("0.weight") - start
        torch.testing.assert_close(found, share * moved, rtol=0, atol=1e-7)  # differences of values below 1
    assert {"averages.fast", "averages.ema_100"} <= {".".join(k.split(".")[:2]) for k in step.state_dict()["optimizer"]}


def distilled(model: nn.Module, ema: fc.EMA, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A consistency loss, and the distance to the average as it was before the step."""
    with torch.no_grad():
        target = ema.model(x + 0.1)
        apart = sum((p - a).square().sum() for p, a in zip(model.parameters(), ema.model.parameters(), strict=True))
    assert isinstance(apart, Tensor)
    return F.mse_loss(model(x), target), {"apart": apart}


@pytest.mark.filterwarnings("ignore:the step is captured by running it")
@pytest.mark.parametrize("mode", MODES)
def test_a_loss_reads_it_as_it_was_before_the_step(mode: str) -> None:
    model, twin = mlp(), mlp()
    ema = fc.EMA(model, 0.9)
    step = fc.compile_training_step(
        model, lambda model, x: distilled(model, ema, x), optimizer="adamw", lr=1e-2, ema=ema, **MODES[mode]
    )
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.01)
    average = mlp().eval()
    for buffer, own in zip(average.buffers(), twin.buffers(), strict=True):
        buffer.set_(own)  # type: ignore[call-overload]
    for seed in range(4):
        x = batch(seed)
        target = average(x + 0.1).detach()
        apart = sum((p - a).square().sum() for p, a in zip(twin.parameters(), average.parameters(), strict=True))
        loss = F.mse_loss(twin(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            [a.lerp_(p, 0.1) for a, p in zip(average.parameters(), twin.parameters(), strict=True)]
        # Sums of 32 and of 80 products of fp32, after steps of 1e-2 that carry their rounding on.
        torch.testing.assert_close(step(x), loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(step.metrics["apart"], torch.as_tensor(apart).detach(), rtol=1e-4, atol=1e-6)


def test_its_model_evaluates_is_saved_under_clean_names_and_says_that_it_moved(tmp_path: Path) -> None:
    step, ema = made(optimizer="adamw", mode="eager")
    assert not ema.model.training and "kept by a step" in repr(ema)
    before = ema.model.get_parameter("0.weight")._version
    step(batch(0))
    assert ema.model.get_parameter("0.weight")._version > before
    safetensors.torch.save_file(ema.model.state_dict(), tmp_path / "ema.safetensors")
    plain = mlp()
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "ema.safetensors"))
    x = batch(5)
    assert torch.equal(plain.eval()(x), ema.model(x))
    step.release()
    assert torch.equal(plain(x), ema.model(x))


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"give it to compile_training_step\(model, loss_fn, ema=ema\)"):
        fc.EMA(mlp()).model  # noqa: B018
    with pytest.raises(ValueError, match="was given another model"):
        fc.compile_training_step(mlp(), squares, ema=fc.EMA(mlp()), mode="eager")
    step, ema = made(mode="eager")
    with pytest.raises(ValueError, match="kept by a step already"):
        fc.compile_training_step(step.release(), squares, ema=ema, mode="eager")
    with pytest.raises(TypeError, match="give an EMA, or several"):
        fc.compile_training_step(mlp(), squares, ema=[0.9], mode="eager")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="two averages are called 'ema'"):
        fc.compile_training_step(mlp(), squares, ema=[fc.EMA(), fc.EMA()], mode="eager")
    with pytest.raises(ValueError, match="ema_rate"):
        step, ema = made(mode="eager")
        step.hyperparameters["ema_rate"] = 1.5
    for odd in (
        {"decay": 1.0},
        {"warmup": "slow"},
        {"min_decay": 1.0},
        {"update_every": 0},
        {"name": "a b"},
        {"warmup": (1.0, 0.0)},
    ):
        with pytest.raises(ValueError, match=r"EMA\("):
            fc.EMA(**odd)


def test_snapshots_of_a_training_make_another_width(tmp_path: Path) -> None:
    model = mlp()
    averages = fc.EMA.power(model, (0.05, 0.08, 0.10))
    step = fc.compile_training_step(model, squares, optimizer="adamw", lr=1e-3, ema=averages, mode="eager")
    with pytest.raises(ValueError, match="was not updated yet"):
        averages[0].snapshot(tmp_path)
    for n in range(1, 201):
        step(batch(n))
        if n % 10 == 0:
            averages[0].snapshot(tmp_path)
            averages[2].snapshot(tmp_path)
    found = fc.EMA.reconstruct(tmp_path, sigma_rel=0.08)
    for name, value in values(averages[1].model).items():
        assert (found[name] - value).norm() < 1e-3 * value.norm()
    with pytest.raises(ValueError, match="has no power function profile"):
        made(mode="eager")[1].snapshot(tmp_path)


def test_another_librarys_average_goes_on_in_a_step() -> None:
    model, twin = mlp(), mlp()
    theirs = diffusers.training_utils.EMAModel(twin.parameters(), decay=0.99)
    for _ in range(7):
        theirs.step([nn.Parameter(p + 0.1) for p in twin.parameters()])
    ema = fc.EMA(model, 0.99, warmup="ramp")
    step = fc.compile_training_step(model, squares, optimizer="adamw", lr=1e-2, ema=ema, mode="eager")
    ema.load_state_dict(theirs.state_dict())
    for n in range(3):
        step(batch(n))
        theirs.step(model.parameters())
    # Two roundings in each of three steps, of values below 1.
    torch.testing.assert_close([*values(ema.model).values()], theirs.shadow_params, rtol=0, atol=5e-7)
