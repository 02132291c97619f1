"""``as_torch_optimizer(…, ema=…)``: the average follows the deployed weights in every kind of loop."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import diffusers.training_utils
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.torch_optimizer import TorchOptimizer

ROUNDING = 5e-7  # two roundings in each of six steps, of values below 1


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    # No bias before the normalization: its gradient is zero but for rounding, along which AdamW moves.
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def batch(seed: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def made(model: nn.Module, recipe: str = "adamw", params: Any = None, **options: Any) -> tuple[TorchOptimizer, fc.EMA]:
    ema = fc.EMA(model, 0.9, **options)
    given = model if params is None else params
    return fc.optim.as_torch_optimizer(given, recipe, lr=1e-2, ema=ema, mode="eager"), ema


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def followed(want: dict[str, Tensor], weights: dict[str, Tensor], decay: float = 0.9) -> dict[str, Tensor]:
    return {n: decay * want[n] + (1 - decay) * w for n, w in weights.items()}


@pytest.mark.filterwarnings("ignore:.* has a gradient, and had none")
@pytest.mark.parametrize("lacking", ["nothing", "a parameter", "a group"])
@pytest.mark.parametrize("recipe", ["adamw", "sf_normuon"])
def test_it_averages_the_deployed_weights_also_of_what_has_no_gradient(recipe: str, lacking: str) -> None:
    model = mlp()
    named = dict(model.named_parameters())
    first = [(n, p) for n, p in named.items() if n[0] in "01"]
    params = [{"params": first}, {"params": [(n, p) for n, p in named.items() if n[0] not in "01"]}]
    optimizer, ema = made(model, recipe, params, warmup="ramp")
    teacher, want = ema.model, values(model)
    for n in range(6):
        model(batch(n)).square().mean().backward()
        for name, p in first if n % 2 == 0 else ():
            if lacking == "a group" or (lacking == "a parameter" and name == "0.weight"):
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        optimizer.eval()
        want = followed(want, values(model), min(0.9, (1 + n) / (10 + n)) if n else 0.0)
        optimizer.train()
        torch.testing.assert_close(values(teacher), want, rtol=0, atol=ROUNDING)
    assert ema.model is teacher and teacher.get_buffer("1.running_mean") is model[1].running_mean


def test_a_consistency_loss_that_reads_it_is_the_ordinary_loop() -> None:
    model, twin = mlp(), mlp()
    optimizer, ema = made(model)
    average = copy.deepcopy(twin).eval().requires_grad_(False)
    average[1]._buffers = twin[1]._buffers
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.01)
    for n in range(5):
        x = batch(n)
        loss, other = F.mse_loss(model(x), ema.model(x + 0.1)), F.mse_loss(twin(x), average(x + 0.1))
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)  # sums of 32 products, after steps of 1e-2
        optimizer.zero_grad()
        theirs.zero_grad()
        loss.backward()
        other.backward()
        optimizer.step()
        theirs.step()
        with torch.no_grad():
            [a.lerp_(p, 0.1) for a, p in zip(average.parameters(), twin.parameters(), strict=True)]


def test_a_step_that_a_gradscaler_leaves_out_leaves_it_and_its_rate_is_live() -> None:
    model = mlp()
    optimizer, ema = made(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for n in range(2):
        scaler.scale(model(batch(n)).square().mean() * (float("inf") if n else 1.0)).backward()
        before = values(ema.model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert n == 0 or all(torch.equal(before[k], v) for k, v in values(ema.model).items())
    optimizer.param_groups[0]["ema_rate"] = 1.0
    model(batch(3)).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(values(ema.model), values(model), rtol=0, atol=ROUNDING)


def test_a_resumed_run_has_it_bitwise_and_a_checkpoint_without_one_starts_it_anew() -> None:
    def train(model: nn.Module, optimizer: TorchOptimizer, steps: range) -> None:
        for n in steps:
            optimizer.zero_grad()
            model(batch(n)).square().mean().backward()
            optimizer.step()

    model, again, plain = mlp(), mlp(), mlp()
    optimizer, ema = made(model)
    train(model, optimizer, range(3))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(3, 5))
    resumed, other = made(again)
    assert other.model is not again  # read, and not written, before it is loaded
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, range(3, 5))
    for name, value in values(ema.model).items():
        assert torch.equal(value, other.model.get_parameter(name))
    without = fc.optim.as_torch_optimizer(plain, "adamw", lr=1e-2, mode="eager")
    train(plain, without, range(3))
    resumed.load_state_dict(without.state_dict())
    torch.testing.assert_close(values(other.model), values(again), rtol=0, atol=0)
    kept, with_average = without.state[plain.get_parameter("0.weight")], resumed.state[again.get_parameter("0.weight")]
    assert {*kept} < {*with_average}


def test_a_copy_and_a_pickled_optimizer_have_one_of_their_own() -> None:
    model = mlp()
    optimizer, ema = made(model)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    for model_too, copied in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        (other,) = copied.averages
        want = values(ema.model)
        torch.testing.assert_close(values(other.model), want, rtol=0, atol=0)
        model_too(batch(1)).square().mean().backward()
        copied.step()
        assert not torch.equal(other.model.get_parameter("0.weight"), want["0.weight"])
        torch.testing.assert_close(values(ema.model), want, rtol=0, atol=0)


def test_a_frozen_part_joins_and_an_average_is_loaded_before_the_first_step() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer, ema = made(model)
    theirs = diffusers.training_utils.EMAModel(model.parameters(), decay=0.9)
    theirs.shadow_params = [p + 1 for p in theirs.shadow_params]
    theirs.optimization_step = 7
    ema.load_state_dict(theirs)
    want = {**{n: p + 1 for n, p in values(model).items()}, **values(nn.ModuleList([model[0]]))}
    torch.testing.assert_close(values(ema.model), {n: v for n, v in want.items() if n in values(model)})
    for n in range(4):
        if n == 2:
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        model(batch(n)).square().mean().backward()
        optimizer.step()
        want = followed({n: want[n] for n in values(model)}, values(model))
        torch.testing.assert_close(values(ema.model), want, rtol=0, atol=2 * ROUNDING)
    assert int(next(iter(ema.counters.values())).taken) == 11


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="needs the module whose parameters are averaged"):
        fc.optim.as_torch_optimizer(model.parameters(), "adamw", ema=fc.EMA(decay=0.9), mode="eager")
    with pytest.raises(ValueError, match=r"another model than as_torch_optimizer\(\)"):
        fc.optim.as_torch_optimizer(model, "adamw", ema=fc.EMA(mlp()), mode="eager")
    optimizer, _ = made(model[0], params=model.named_parameters())
    model(batch(0)).square().mean().backward()
    with pytest.raises(
        ValueError, match=r"1\.weight \[8\] is no parameter of the model that EMA 'ema' is an average of"
    ):
        optimizer.step()
