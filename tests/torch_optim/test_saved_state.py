"""Loading a torch optimizer's state: all is checked before anything is changed."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile import optim
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.small_models import batches, mlp
from tests.torch_loops import equal, made, train, weights


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("lr", -1.0, ValueError),
        ("lr", None, TypeError),
        ("lr", "fast", TypeError),
        ("beta1", math.nan, ValueError),
        ("eps", -1.0, ValueError),
        ("steps", -1, ValueError),
        ("steps", "many", ValueError),
    ],
)
def test_a_checkpoint_with_a_wrong_number_changes_nothing(key: str, value: Any, error: type[Exception]) -> None:
    model = mlp()
    optimizer = made(model, optim.adamw(lr=1e-2))
    train(model, optimizer, batches(2))
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches(3)[2:])
    kept = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(error, match=rf"the checkpoint is wrong, and nothing was loaded: .*{key}"):
        optimizer.load_state_dict(saved)
    now = optimizer.state_dict()
    assert now["param_groups"] == kept["param_groups"]
    for index, parts in kept["state"].items():
        assert equal(parts, now["state"][index])


def after_the_sweep(model: nn.Module, optimizer: TorchOptimizer, bring_back: str) -> None:
    """What an LR finder does: keep model and optimizer, train, bring both back, in either order."""
    start, fresh = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches(5, dtype=next(model.parameters()).dtype))
    if bring_back == "clear":
        model.load_state_dict(start)
        optimizer.state.clear()
    elif bring_back == "optimizer first":
        optimizer.load_state_dict(fresh)
        model.load_state_dict(start)
    else:
        model.load_state_dict(start)
        optimizer.load_state_dict(fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bring_back", ["model first", "optimizer first", "clear"])
@pytest.mark.parametrize("name", ["adamw", "sf_adamw", "sf_normuon"])
def test_a_fresh_state_takes_the_weights_that_were_loaded(name: str, bring_back: str, dtype: torch.dtype) -> None:
    """The run that follows is, bit for bit, the one without the sweep."""
    found = []
    for swept in (True, False):
        model = mlp(dtype)
        optimizer = made(model, name)
        if swept:
            after_the_sweep(model, optimizer, bring_back)
        train(model, optimizer, batches(4, dtype=dtype))
        y = weights(model)
        optimizer.eval()
        found.append((y, weights(model), [g["steps"] for g in optimizer.param_groups]))
    assert equal(found[0][0], found[1][0]) and equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2] == [4]


def test_right_after_loading_the_model_is_what_was_loaded_in_both_modes() -> None:
    model = mlp()
    optimizer = made(model, "sf_adamw")
    start, fresh = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for evaluating in (False, True):
        train(model, optimizer, batches(3))
        optimizer.train(not evaluating)
        model.load_state_dict(start)
        optimizer.load_state_dict(fresh)
        assert equal(dict(model.state_dict()), start)  # and warns of nothing: before the first step y is x
        optimizer.train()
        assert equal(dict(model.state_dict()), start)


def test_the_state_of_one_parameter_may_be_dropped() -> None:
    """``del optimizer.state[p]``, as for weights that were drawn again; the others go on."""
    model = mlp()
    optimizer = made(model, "sf_adamw")
    train(model, optimizer, batches(3))
    optimizer.eval()
    again, other = model.get_parameter("0.weight"), model.get_parameter("2.weight")
    with torch.no_grad():
        again.fill_(0.25)
    optimizer.train()
    z = optimizer.state[other]["z"].clone()
    with torch.no_grad():
        again.fill_(0.25)
    del optimizer.state[again]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for part in ("x", "z"):
        assert torch.equal(optimizer.state[again][part], torch.full((8, 4), 0.25))
    assert torch.equal(optimizer.state[other]["z"], z) and optimizer.param_groups[0]["steps"] == 4


@pytest.mark.parametrize("ours", [True, False])
def test_what_others_keep_in_the_state_stays_there(ours: bool) -> None:
    """After a step, after a parameter joined, in the state dict and after it was loaded: as in torch.optim."""
    model = mlp()
    model[2].requires_grad_(False)
    optimizer: Any = made(model) if ours else torch.optim.AdamW(model.parameters())
    weight = model.get_parameter("0.weight")
    train(model, optimizer, batches(1))
    average = weight.detach().clone()
    optimizer.state[weight]["ema"] = average
    optimizer.state["seen"] = {"batches": 1}
    for thaw in (False, True):
        model[2].requires_grad_(thaw)
        train(model, optimizer, batches(1))
        assert optimizer.state[weight]["ema"] is average
    saved = copy.deepcopy(optimizer.state_dict())
    again = mlp()
    fresh: Any = made(again) if ours else torch.optim.AdamW(again.parameters())
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.state[again.get_parameter("0.weight")]["ema"], average)
    assert fresh.state["seen"] == {"batches": 1}


def test_names_in_another_order_are_loaded_by_name() -> None:
    """torch loads by place, and two biases of one shape would change places without a word."""
    model = mlp()
    pairs = list(model.named_parameters())
    optimizer = made(pairs)
    train(model, optimizer, batches(2))
    saved = copy.deepcopy(optimizer.state_dict())
    again = mlp()
    fresh = made(list(reversed(list(again.named_parameters()))))
    fresh.load_state_dict(saved)
    for (name, p), (_, q) in zip(pairs, again.named_parameters(), strict=True):
        assert equal(optimizer.state[p], fresh.state[q]), name
    assert fresh.param_groups[0]["param_names"] == ["2.bias", "2.weight", "0.bias", "0.weight"]


@pytest.mark.parametrize("evaluating", [True, False])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("name", ["adamw", "sf_adamw", "sf_normuon"])
def test_a_resume_is_bitwise_in_either_order(name: str, order: str, evaluating: bool) -> None:
    """As DCP's ``set_state_dict``, which loads the optimizer first, and ignite's checkpoints, in the user's order."""

    def loaded(saved: Any) -> Any:
        model = mlp()
        optimizer = made(model, name)
        if order == "model first":
            model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        if order != "model first":
            model.load_state_dict(saved[0])
        return model, optimizer

    model = mlp()
    optimizer = made(model, name)
    train(model, optimizer, batches(3))
    optimizer.train(not evaluating)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saving y
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, other = loaded(saved)
    optimizer.train()
    other.train()
    for m, o in ((model, optimizer), (again, other)):
        train(m, o, batches(6)[3:])  # a warning is an error here
        o.eval()
    assert equal(weights(again), weights(model))


def test_other_weights_loaded_at_y_are_y() -> None:
    """x follows them, as in ``schedulefree``: at β = 0.9 by ten ninths of the way."""
    model = mlp()
    optimizer = made(model, "sf_adamw")
    train(model, optimizer, batches(3))
    weight = model.get_parameter("0.weight")
    y, x = weight.detach().clone(), optimizer.state[weight]["x"].clone()
    model.load_state_dict({n: torch.zeros_like(p) for n, p in model.named_parameters()})
    optimizer.eval()
    torch.testing.assert_close(weight.detach(), x - y / 0.9)
