"""Timesteps of every form: several of them, Python numbers, and lists of latents beside them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc

X, TIMES = torch.linspace(-1, 1, 24).reshape(2, 3, 4), (1.0, 0.75, 0.5, 0.25)


def at(t: float) -> Tensor:
    return torch.full((2,), t)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.time, self.other = nn.Linear(4, 4), nn.Linear(1, 4), nn.Linear(1, 4)


class FlowMap(Base):
    """MeanFlow, AnyFlow: the time that a step starts from, and the time that it jumps to."""

    def forward(self, x: Tensor, timestep: Tensor, r_timestep: Tensor, cond: Tensor) -> Tensor:
        both = self.time(timestep[:, None, None]) * self.other(r_timestep[:, None, None])
        shifted: Tensor = self.out(x) * both + cond
        return shifted


class TwoStreams(Base):
    """LTX-2: video and audio, each with its own time and its own sigma."""

    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        timestep: Tensor,
        audio_timestep: Tensor,
        sigma: Tensor,
        audio_sigma: Tensor,
    ) -> tuple[Tensor, Tensor]:
        video = self.out(hidden_states) * self.time(timestep[:, None, None] + 0.001 * sigma[:, None, None])
        audio = self.out(audio_hidden_states) + self.other(audio_timestep[:, None, None] * audio_sigma[:, None, None])
        return video + audio.mean(), audio


def made(kind: type[Base], **options: Any) -> tuple[Base, fc.Sampler]:
    model = kind().eval().requires_grad_(False)
    return model, fc.optimize_sampler(model, 4, mode="eager", **options)


def test_two_times_are_one_row() -> None:
    model, sampler = made(FlowMap)
    cond = torch.randn(2, 1, 4)
    pairs = [(t, r) for t in TIMES for r in (0.0, t / 2, t)]
    for _ in range(2):
        for t, r in pairs[:12]:
            assert torch.equal(sampler(X, at(t), at(r), cond), model(X, at(t), at(r), cond))
    assert sampler.release_weights(to="drop") == 4 * 4 * 4  # two layers of a weight [4, 1] and a bias [4]
    kept = model.out.weight.numel()
    assert kept == 16 and sampler(X, at(TIMES[0]), at(0.0), cond).shape == X.shape
    with pytest.raises(RuntimeError, match=r"timestep \[0.3.*, 0.1.*\] is not in the sampler's schedule"):
        sampler(X, at(0.3), at(0.1), cond)


def test_each_of_two_streams_has_its_own_times_and_dtypes() -> None:
    model, sampler = made(TwoStreams)
    sound = torch.randn(2, 5, 4)
    for i, t in enumerate(TIMES):
        clocks = {
            "timestep": at(1000 * t).long(),
            "audio_timestep": at(t * t),
            "sigma": at(t),
            "audio_sigma": at(1 - i / 4).double().float(),
        }
        call = {"hidden_states": X, "audio_hidden_states": sound, **clocks}
        assert all(map(torch.equal, sampler(**call), model(**call)))
        assert all(map(torch.equal, sampler(**call), model(**call)))
    assert "audio_hidden_states=live" in sampler.report.programs[0].roles
    assert "audio_sigma=step" in sampler.report.programs[0].roles
    call["audio_timestep"] = torch.tensor([0.1, 0.9])
    with pytest.warns(UserWarning, match="differs within one call"):
        assert all(map(torch.equal, sampler(**call), model(**call)))


def test_a_schedule_of_the_first_clock_leaves_the_others_free() -> None:
    model, sampler = made(FlowMap, timesteps=TIMES)
    cond = torch.randn(2, 1, 4)
    for t in TIMES:
        assert torch.equal(sampler(X, at(t), at(t / 2), cond), model(X, at(t), at(t / 2), cond))
    sampler.prepare(timesteps=[0.9, 0.3])
    assert torch.equal(sampler(X, at(0.9), at(0.3), cond), model(X, at(0.9), at(0.3), cond))
    with pytest.warns(UserWarning, match="is not in the sampler's schedule"):
        assert torch.equal(sampler(X, at(0.7), at(0.3), cond), model(X, at(0.7), at(0.3), cond))


def test_rank_conditioning_follows_one_clock() -> None:
    _, sampler = made(FlowMap, conditioning=fc.Rank(2, (0, 1)))
    with pytest.raises(ValueError, match="follows one clock, and timestep, r_timestep are timesteps"):
        sampler(X, at(0.5), at(0.1), torch.zeros(2, 1, 4))


class OfNumbers(Base):
    """diffusion_policy and diffusers' UNets: ``model(x, 37)``."""

    def forward(self, sample: Tensor, timestep: Any, scale: float = 1.0) -> Tensor:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        elif timestep.dim() == 0:
            timestep = timestep[None]
        t = timestep.expand(len(sample)).float()
        shifted: Tensor = self.out(sample) * self.time(t[:, None, None]) * scale
        return shifted


class Scaled(Base):
    """A noise level as a number in arithmetic."""

    def forward(self, x: Tensor, sigma: Any) -> Tensor:
        scaled: Tensor = self.out(x / (1 + sigma**2) ** 0.5) * sigma
        return scaled


@pytest.mark.parametrize(("kind", "times"), [(OfNumbers, (90, 60, 30)), (Scaled, (1.5, 0.7, 0.1))])
def test_a_python_number_is_a_timestep(kind: type[Base], times: tuple[float, ...]) -> None:
    model, sampler = made(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for t in times:
                assert torch.equal(sampler(X, t), model(X, t))
    assert len(sampler.report.programs) == 1  # one program, not one for each number
    assert sampler.release_weights(to="drop") > 0 or kind is Scaled
    assert torch.equal(sampler(X, times[0]), sampler(X, times[0]))


def test_numbers_are_prepared_and_beyond_a_schedule_the_model_gets_the_number() -> None:
    model, sampler = made(OfNumbers, timesteps=[90, 60, 45, 10])
    sampler.prepare((X, 90))
    assert torch.equal(sampler(X, 60), model(X, 60))
    with pytest.warns(UserWarning, match=r"timestep \[30\] is not in the sampler's schedule"):
        assert torch.equal(sampler(X, 30), model(X, 30))


def test_a_number_that_the_model_tells_from_a_tensor_is_served_by_the_model() -> None:
    class Tells(Base):
        def forward(self, x: Tensor, t: Any) -> Tensor:
            told: Tensor = self.out(x) * (t if isinstance(t, float) else t * 2)
            return told

    model, sampler = made(Tells)
    with pytest.warns(UserWarning, match=r"t=0.5 is a number, and Tells computes something else .*whole model serves"):
        assert torch.equal(sampler(X, 0.5), model(X, 0.5))
    assert torch.equal(sampler(X, torch.tensor(0.5)), model(X, torch.tensor(0.5)))


def test_a_list_of_latents_is_live() -> None:
    class Lists(Base):
        def forward(self, vision_tokens: list[Tensor], timestep: Tensor) -> list[Tensor]:
            return [self.out(x) * self.time(timestep[:, None, None]) for x in vision_tokens]

    model, sampler = made(Lists)
    for t in TIMES:
        latents = [torch.randn(2, 3, 4), torch.randn(2, 5, 4)]
        assert all(map(torch.equal, sampler(latents, at(t)), model(latents, at(t))))
    assert sampler.release_weights(to="drop") == 4 * 8
