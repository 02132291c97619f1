"""Averages that other libraries kept: found by name or by order, with their count of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers.training_utils
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fusion_compile._state.saved_averages import read_average
from fusion_compile.optim import Average


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def parameters() -> dict[str, torch.Tensor]:
    return dict(model().named_parameters())


def of_diffusers(average: nn.Module) -> Any:
    kept = diffusers.training_utils.EMAModel(average.parameters(), decay=0.999)
    kept.optimization_step = 5
    return kept


def of_swa_utils(average: nn.Module) -> Any:
    kept = AveragedModel(average, use_buffers=True)
    kept.n_averaged.fill_(5)
    return kept.state_dict()


def of_timm(average: nn.Module) -> Any:  # ModelEmaV2 and ModelEmaV3 are modules with one part, `module`
    return nn.ModuleDict({"module": average}).state_dict()


def of_timms_checkpoint(average: nn.Module) -> Any:
    return {"epoch": 3, "state_dict": {}, "state_dict_ema": average.state_dict()}


def of_ema_pytorch(average: nn.Module) -> Any:
    parts = nn.ModuleDict({"online_model": model(), "ema_model": average})
    return {**parts.state_dict(), "initted": torch.tensor(True), "step": torch.tensor(5)}


def compiled(average: nn.Module) -> Any:
    return {f"_orig_mod.{n}": t for n, t in average.state_dict().items()}


@pytest.mark.parametrize(
    ("saved", "updates"),
    [
        (of_diffusers, 5),
        (of_swa_utils, 5),
        (of_timm, None),
        (of_timms_checkpoint, None),
        (of_ema_pytorch, 5),
        (compiled, None),
    ],
)
def test_weights_and_count_are_found(saved: Callable[[nn.Module], Any], updates: int | None) -> None:
    own, average = parameters(), model()
    with torch.no_grad():
        [p.add_(1) for p in average.parameters()]
    found = read_average(saved(average), own, set(own), Average(rate=1 - 0.999))
    assert found.updates == updates and found.weights.keys() == own.keys()
    for name, p in average.named_parameters():
        assert torch.equal(found.weights[name], p)


def test_a_list_may_have_the_trained_parameters_alone_and_frozen_ones_are_not_taken() -> None:
    own = parameters()
    averaged = [name for name in own if name[0] == "2"]
    short = {"shadow_params": [own[name] + 1 for name in averaged]}
    long = {"shadow_params": [p + 1 for p in own.values()]}
    for saved in (short, long):
        found = read_average(saved, own, averaged, Average())
        assert [*found.weights] == averaged and torch.equal(found.weights["2.bias"], own["2.bias"] + 1)


def test_what_does_not_fit_is_refused_and_another_decay_is_told() -> None:
    own = parameters()
    with pytest.raises(TypeError, match=r"was given a list; give the state_dict\(\) of an average"):
        read_average([], own, set(own), Average())
    with pytest.raises(ValueError, match="the average has 1 parameters, the model 6, of which 6 are averaged"):
        read_average({"shadow_params": [torch.ones(2)]}, own, set(own), Average())
    odd = {**own, "0.weight": torch.ones(2, 2)}
    del odd["2.bias"]
    with pytest.raises(ValueError, match=r"missing 2\.bias \[2\]\n.*mismatched 0\.weight: \[2, 2\] in the checkpoint"):
        read_average(odd, own, set(own), Average())
    with pytest.warns(UserWarning, match=r"was kept with decay=0\.99 and goes on with 0\.9999"):
        read_average({**own, "decay": 0.99}, own, set(own), Average())
