"""What a caller passes by keyword reaches the model by keyword, in every way in which a sampler makes a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc

X, TIMES = torch.linspace(-1, 1, 8).reshape(2, 4), (1.0, 0.5, 0.25)


def at(t: float) -> Tensor:
    return torch.full((2,), t)


def with_options(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As diffusers' wrapper for a LoRA scale: it looks among the keywords alone, and the signature does not show it."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.gain = (kwargs.get("options") or {}).get("scale", 1.0)
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.gain = 1.0

    return wrapper


class Scaled(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.time, self.out = nn.Linear(1, 4), nn.Linear(4, 4)

    @with_options
    def forward(self, x: Tensor, t: Tensor, options: dict[str, float] | None = None) -> Tensor:
        scaled: Tensor = self.out(x) * self.time(t[:, None]) * self.gain
        return scaled


def scaled() -> Scaled:
    model = Scaled().eval().requires_grad_(False)
    model.gain = 1.0
    return model


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.2])
def test_a_wrapper_finds_its_keyword(scale: float) -> None:
    model = scaled()
    sampler = fc.optimize_sampler(model, 3, mode="eager")
    named = {"options": {"scale": scale}}
    for t in TIMES:
        assert torch.equal(sampler(X, at(t), **named), model(X, at(t), **named))
        assert torch.equal(sampler(x=X, t=at(t), **named), model(X, at(t), **named))
        # by position the wrapper does not see it, in the model as in the sampler
        assert torch.equal(sampler(X, at(t), *named.values()), model(X, at(t)))


def test_so_it_is_in_preparation_in_sampling_and_where_the_whole_model_serves() -> None:
    model = scaled()
    named: dict[str, Any] = {"options": {"scale": 0.5}}
    sampler = fc.optimize_sampler(model, timesteps=TIMES, mode="eager")
    sampler.prepare((X, at(1.0)), named)
    assert len(sampler.report.programs) == 1
    assert torch.equal(sampler(X, at(1.0), **named), model(X, at(1.0), **named))
    sampler.prepare(kwargs=named)
    expected = X
    for t, following in zip(TIMES, (*TIMES[1:], 0.0), strict=True):
        expected = expected - (t - following) * model(expected, at(t), **named)
    assert torch.equal(sampler.sample(X, **named), expected)
    assert len(sampler.report.programs) == 1
    with pytest.warns(UserWarning, match="the whole model serves it"):
        assert torch.equal(sampler(X, at(0.9), **named), model(X, at(0.9), **named))


def test_a_hook_that_reads_keywords_finds_them() -> None:
    def double(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {name: 2 * value if name == "x" else value for name, value in kwargs.items()}

    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * t[:, None]

    model = Plain().eval()
    sampler = fc.optimize_sampler(model, 3, mode="eager")
    assert torch.equal(sampler(x=X, t=at(0.5)), 0.5 * X)
    model.register_forward_pre_hook(double, with_kwargs=True)
    with pytest.warns(UserWarning, match="the sampler is built again"):
        assert torch.equal(sampler(x=X, t=at(0.5)), X)
    assert torch.equal(sampler(X, t=at(0.5)), 0.5 * X)


def test_arguments_of_an_open_ended_forward_are_told_apart() -> None:
    """``*args`` and ``**kwargs`` were one argument each, so that no tensor among them could be the timestep."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = scaled()

        def forward(self, *args: Tensor, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = Wrapper().eval()
    sampler = fc.optimize_sampler(model, 3, mode="eager")
    for t in TIMES:
        assert torch.equal(sampler(X, at(t)), model(X, at(t)))
        assert torch.equal(sampler(t=at(t), x=X), model(X, at(t)))
        assert torch.equal(sampler(X, t=at(t), options={"scale": 0.5}), model(X, at(t), options={"scale": 0.5}))
    assert "args[0]=live (guessed), args[1]=step" in sampler.report.programs[0].roles
    swapped = fc.optimize_sampler(model, 3, mode="eager", roles={"args[0]": "live", "args[1]": "step"})
    assert torch.equal(swapped(X, at(0.5)), model(X, at(0.5)))


@pytest.mark.exhaustive
def test_a_lora_scale_of_diffusers_is_in_effect() -> None:
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    sampler = fc.optimize_sampler(model, 4, mode="eager")
    call = {
        "hidden_states": torch.randn(1, 4, 4),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "pooled_projections": torch.randn(1, 10),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
    outputs = []
    for scale in (1.0, 0.5):
        (got,) = sampler(**call, joint_attention_kwargs={"scale": scale})
        assert torch.equal(got, model(**call, joint_attention_kwargs={"scale": scale})[0])
        outputs.append(got)
    assert not torch.equal(*outputs)
