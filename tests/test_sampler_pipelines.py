"""A sampler in the place of a pipeline's transformer: the images are the pipeline's own, bit for bit on the CPU.

No schedule is given: it is learned from what the pipeline asks for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor, nn

from fusion_compile._sampler.without_weights.diffusers_calls import model_of_class
from fusion_compile.sampler import Sampler, optimize_sampler
from tests.models.tiny import TINY, tiny_call, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in version:FutureWarning"),
    # DPMSolverMultistepScheduler gives tensors to numpy.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

STEPS = 4
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": DDIMScheduler,
    "DPM++ multistep": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
}
FLOWS: dict[str, Callable[[], Any]] = {
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
}


@lru_cache(maxsize=1)
def dit_parts() -> tuple[nn.Module, nn.Module]:
    """A transformer that knows the pipeline's null class, 1000, and an autoencoder; random weights, none of them 0."""
    transformer = model_of_class(
        TINY["DiT"].class_name, TINY["DiT"].config | {"num_embeds_ada_norm": 1000, "out_channels": 8}
    )
    autoencoder: Any = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.2)
    return transformer, autoencoder.eval()


def dit_pipeline(scheduler: Any) -> Any:
    transformer, autoencoder = dit_parts()
    pipe: Any = DiTPipeline(transformer=copy.deepcopy(transformer), vae=autoencoder, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, guidance_scale: float, steps: int = STEPS) -> Any:
    return pipe(
        class_labels=[1, 7],
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=steps,
        output_type="np",
    ).images


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_dit_pipeline_gives_the_same_images(scheduler: str, guidance_scale: float) -> None:
    pipe = dit_pipeline(SCHEDULERS[scheduler]())
    expected = images(pipe, guidance_scale)
    model = pipe.transformer
    pipe.transformer = optimize_sampler(model, n_steps=STEPS, mode="eager")
    assert (images(pipe, guidance_scale) == expected).all()
    assert pipe.transformer.release_weights(to="drop") > 0
    assert (images(pipe, guidance_scale) == expected).all()
    assert expected.std() > 0.01


def test_dit_pipeline_with_another_number_of_steps_and_another_scheduler() -> None:
    """One sampler goes with the pipeline as its user changes it."""
    pipe = dit_pipeline(DDIMScheduler())
    model = pipe.transformer
    sampler = optimize_sampler(model, n_steps=STEPS, mode="eager")
    for scheduler, steps in ((DDIMScheduler(), 3), (DDIMScheduler(), 5), (SCHEDULERS["DPM++ multistep"](), 4)):
        pipe.scheduler = scheduler
        pipe.transformer = model
        expected = images(pipe, 4.0, steps)
        pipe.transformer = sampler
        assert (images(pipe, 4.0, steps) == expected).all()


Denoiser = Callable[..., Any]


def sd3_loop(transformer: Denoiser, scheduler: Any, prompt: dict[str, Tensor], start: int = 0) -> Tensor:
    """As StableDiffusion3Pipeline writes it: guidance in one call of twice the batch; image to image from `start`."""
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(STEPS)
    if start:
        scheduler.set_begin_index(start * scheduler.order)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps[start * scheduler.order :]:
        velocity = transformer(
            hidden_states=torch.cat([latents] * 2), timestep=t.expand(2), return_dict=False, **prompt
        )[0]
        null, asked = velocity.chunk(2)
        latents = scheduler.step(null + 5.0 * (asked - null), t, latents, return_dict=False)[0]
    return latents


def flux_loop(transformer: Any, scheduler: Any, prompt: dict[str, Any], null: dict[str, Any] | None) -> Tensor:
    """As FluxPipeline writes it: guidance is an input; a negative prompt is a second call at the same timestep. The
    schedule is shifted by the number of tokens, and t / 1000 is what the model is given."""
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.9)
    latents = torch.randn(1, 16, 4, generator=generator)
    for t in scheduler.timesteps:
        timestep = t.expand(len(latents)).to(latents.dtype) / 1000
        with transformer.cache_context("cond"):
            velocity = transformer(hidden_states=latents, timestep=timestep, return_dict=False, **prompt)[0]
        if null is not None:
            with transformer.cache_context("uncond"):
                other = transformer(hidden_states=latents, timestep=timestep, return_dict=False, **null)[0]
            velocity = other + 3.0 * (velocity - other)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def prompt_of(name: str, model: nn.Module, batch: int) -> dict[str, Any]:
    arguments = tiny_call(name, model, STEPS, batch).arguments
    return {k: v for k, v in arguments.items() if k not in ("hidden_states", "timestep")}


@torch.no_grad()
@pytest.mark.parametrize("flow", FLOWS)
def test_sd3_loop_gives_the_same_latents(flow: str) -> None:
    model = tiny_model("SD3")
    sampler = optimize_sampler(model, n_steps=STEPS, mode="eager")
    for _ in range(2):
        prompt = prompt_of("SD3", model, 2)
        for start in (0, 2):
            expected = sd3_loop(model, FLOWS[flow](), prompt, start)
            assert torch.equal(sd3_loop(sampler, FLOWS[flow](), prompt, start), expected)
            assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("true_cfg", [False, True], ids=["embedded guidance", "negative prompt"])
def test_flux_loop_gives_the_same_latents(true_cfg: bool) -> None:
    model = tiny_model("Flux")
    sampler: Sampler = optimize_sampler(model, n_steps=STEPS, mode="eager")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for _ in range(2):
        prompt = prompt_of("Flux", model, 1)
        null = prompt | {
            name: torch.randn_like(prompt[name]) for name in ("encoder_hidden_states", "pooled_projections")
        }
        expected = flux_loop(model, scheduler, prompt, null if true_cfg else None)
        assert torch.equal(flux_loop(sampler, scheduler, prompt, null if true_cfg else None), expected)
        assert expected.std() > 0.1
    assert sampler.release_weights(to="drop") > 0  # what was seen needs the model no more
    assert torch.equal(flux_loop(sampler, scheduler, prompt, null if true_cfg else None), expected)
