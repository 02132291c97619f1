"""Copies of a sampler, and several samplers of one model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc

TIMES = (1.0, 0.75, 0.5, 0.25)
X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Scaled(nn.Module):
    """A network of the timestep scales the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 4))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scaled: Tensor = self.out(x) * self.time(t[:, None])
        return scaled


def at(t: float) -> Tensor:
    return torch.full((2,), t)


def made(model: Scaled) -> fc.Sampler:
    return fc.optimize_sampler(model, 4, mode="eager", example_inputs=(X, at(1.0)))


@torch.no_grad()
def same(sampler: fc.Sampler, model: nn.Module) -> bool:
    return all(torch.equal(sampler(X, at(t)), model(X, at(t))) for t in TIMES)


@pytest.mark.parametrize("calls", [None, 0, 1, 4])
def test_a_deep_copy_is_a_sampler_of_its_own_model(calls: int | None) -> None:
    """A copy of a sampler that was prepared and not called yet once served numbers of no model at all."""
    model = Scaled().eval()
    sampler = fc.optimize_sampler(model, 4, mode="eager") if calls is None else made(model)
    for t in TIMES[: calls or 0]:
        sampler(X, at(t))
    copied = copy.deepcopy(sampler)
    assert type(copied) is fc.Sampler and copied.model is not model
    assert same(copied, model) and same(sampler, model)
    copied.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    assert not same(copied, model) and same(copied, copied.model) and same(sampler, model)


def test_a_deep_copy_keeps_the_schedule() -> None:
    sampler = made(Scaled().eval())
    sampler.prepare((X, at(1.0)), timesteps=[0.9, 0.1])
    assert torch.equal(copy.deepcopy(sampler).timesteps, torch.tensor([0.9, 0.1]))


def test_pickling_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"a sampler .* cannot be pickled\. Save the model .*copy\.deepcopy"):
        pickle.dumps(made(Scaled().eval()))


@pytest.mark.parametrize("to", ["drop", "cpu"])
def test_samplers_of_one_model_know_what_another_released(to: str) -> None:
    """The second sampler once multiplied empty weights: "mat2 must be a matrix, got 1-D tensor"."""
    model, untouched = Scaled().eval(), Scaled().eval()
    untouched.load_state_dict(model.state_dict())
    first, second = made(model), made(model)
    assert same(first, untouched) and second(X, at(1.0)).shape == (2, 4)
    released = first.release_weights(to=to)
    if to == "drop":
        assert released == 4 * (4 + 4 + 16 + 4)
        with pytest.raises(
            RuntimeError, match=r"needs weights that release_weights\(to='drop'\) dropped \(time\.0\.bias"
        ):
            second(X, at(0.5))
        with pytest.raises(
            RuntimeError, match=r"a copy of the sampler needs weights that .*call restore_weights first"
        ):
            copy.deepcopy(second)
    assert same(first, untouched)
    second.restore_weights(untouched.state_dict())
    assert same(first, untouched) and same(second, untouched) and same(first, model)


def test_what_is_no_module_is_refused() -> None:
    for given in (3, Scaled, lambda x, t: x):
        with pytest.raises(
            TypeError, match=r"model is a (int|type|function); optimize_sampler needs a torch\.nn\.Module"
        ):
            fc.optimize_sampler(given, 4)  # type: ignore[arg-type]
