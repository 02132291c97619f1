"""What is switched on after a sampler was made: caches, offloading, quantised weights, optional attributes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from tests.models.tiny import tiny_call, tiny_model
from tests.sampler.weights.test_unservable import Quantised

X, TIMES = torch.linspace(-1, 1, 8).reshape(2, 4), (1.0, 0.75, 0.5, 0.25)
WHOLE = "Meanwhile the whole model serves, and nothing is hoisted"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.out = nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scaled: Tensor = self.out(x) * self.time(t[:, None]) * getattr(self, "boost", 1.0)
        return scaled


def at(t: float) -> Tensor:
    return torch.full((2,), t)


def made() -> tuple[Scaled, fc.Sampler]:
    model = Scaled().eval().requires_grad_(False)
    sampler = fc.optimize_sampler(model, 4, mode="eager")
    for t in TIMES:
        sampler(X, at(t))
    return model, sampler


def same(sampler: fc.Sampler, model: nn.Module) -> bool:
    return all(torch.equal(sampler(X, at(t)), model(X, at(t))) for t in TIMES)


class Remembering:
    """A hook of diffusers' kind: what it gives depends on the calls before."""

    hooks = ("a cache",)


def remember(model: Scaled) -> None:
    before, kept = model.out.forward, []

    def forward(x: Tensor) -> Tensor:
        kept.append(before(x))
        return torch.stack(kept).mean(0)

    model.out._diffusers_hook = Remembering()  # type: ignore[assignment]
    model.out.forward = forward  # type: ignore[method-assign,assignment]


def test_a_cache_that_is_switched_on_later_is_in_effect() -> None:
    """The graph once kept what the cache did at the moment of its export."""
    model, sampler = made()
    twin = copy.deepcopy(model)
    remember(model)
    remember(twin)
    with pytest.warns(UserWarning, match=f"out has diffusers' hook .*{WHOLE}"):
        outputs = [sampler(X, at(t)) for t in TIMES]
    expected = [twin(X, at(t)) for t in TIMES]
    assert all(map(torch.equal, outputs, expected))


def quantise(model: Scaled) -> None:
    model.out.weight = nn.Parameter(Quantised(model.out.weight.detach() / 2), requires_grad=False)


def offload(model: Scaled) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.time, hooks.AlignDevicesHook(io_same_device=True))


@pytest.mark.parametrize("change", [quantise, offload])
@pytest.mark.parametrize("used", [True, False])
def test_quantised_weights_and_offloading_are_served_by_the_whole_model(
    change: Callable[[Scaled], None], used: bool
) -> None:
    model, sampler = made()
    if not used:
        sampler = fc.optimize_sampler(model, 4, mode="eager")
    change(model)
    with pytest.warns(UserWarning, match=WHOLE):
        assert same(sampler, model)


def test_what_is_switched_off_again_is_hoisted_again() -> None:
    model, sampler = made()
    offload(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(sampler, model)
        pytest.importorskip("accelerate.hooks").remove_hook_from_module(model.time)
        assert same(sampler, model)
    assert len(sampler.report.programs) == 1


def test_weights_that_are_out_of_memory_are_named() -> None:
    model, sampler = made()
    sampler.release_weights(to="drop")
    remember(model)
    with pytest.raises(RuntimeError, match=r"which needs weights that release_weights took out .*time\.bias"):
        sampler(X, at(1.0))


def test_an_attribute_that_the_model_can_do_without_is_followed() -> None:
    """FreeU of diffusers sets factors that its blocks ask for with ``getattr(self, "s1", None)``."""
    model, sampler = made()
    before = sampler(X, at(1.0))
    setattr(model, "boost", 2.0)  # noqa: B010 (nothing declares it)
    with pytest.warns(UserWarning, match=r"boost .*the sampler is built again"):
        assert same(sampler, model) and not torch.equal(before, sampler(X, at(1.0)))
    delattr(model, "boost")
    assert same(sampler, model) and torch.equal(before, sampler(X, at(1.0)))


def test_diffusers_own_cache_is_in_effect() -> None:
    diffusers = pytest.importorskip("diffusers")
    model: Any = tiny_model("Flux").eval().requires_grad_(False)
    call = tiny_call("Flux", model, 4)
    sampler = fc.optimize_sampler(model, 4, mode="eager")
    plain = sampler(**call.arguments).sample
    twin = copy.deepcopy(model)
    outputs = {}
    for one in (model, twin):
        one.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
        called = sampler if one is model else twin
        with warnings.catch_warnings(), one.cache_context("cond"), torch.no_grad():
            warnings.simplefilter("ignore")
            first, second = call.arguments, {**call.arguments, "timestep": 0.5 * call.arguments["timestep"]}
            outputs[one] = [called(**first).sample, called(**second).sample]
    assert all(map(torch.equal, outputs[model], outputs[twin]))
    uncached = copy.deepcopy(model)
    uncached.disable_cache()
    with torch.no_grad():
        assert torch.equal(outputs[model][0], plain)
        assert not torch.equal(outputs[model][1], uncached(**second).sample), "the cache did nothing"
