"""A sampler takes its model's place: signature, names, attributes, hooks, and a pipeline's slot."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile.sampler import optimize_sampler
from tests.small_denoiser import X, Y, denoiser, exactly, make


def test_it_has_the_models_signature() -> None:
    sampler = make()
    assert list(inspect.signature(sampler.forward).parameters) == ["x", "timestep", "y"]
    assert inspect.signature(sampler.forward) == inspect.signature(sampler.model.forward)
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        sampler(X, torch.ones(2))


def test_parameters_and_the_state_dict_have_the_models_names() -> None:
    sampler, other = make(), denoiser()
    assert list(sampler.state_dict()) == list(sampler.model.state_dict())
    assert [n for n, _ in sampler.named_parameters()] == [n for n, _ in sampler.model.named_parameters()]
    assert list(map(id, sampler.parameters())) == list(map(id, sampler.model.parameters()))
    assert list(sampler.named_buffers()) == list(sampler.model.named_buffers())
    assert sampler.get_parameter("time.weight") is sampler.model.time.weight  # type: ignore[union-attr]
    assert sampler.get_submodule("time") is sampler.model.time
    assert exactly(sampler, 1.0)
    sampler.load_state_dict(other.state_dict())
    assert exactly(sampler, 1.0)
    with torch.no_grad():
        assert torch.equal(sampler(X, torch.ones(2), Y), other(X, torch.ones(2), Y))
    with pytest.raises(RuntimeError, match="Missing key"):
        sampler.load_state_dict({})
    assert sampler.load_state_dict({}, strict=False).missing_keys


def test_attributes_that_only_the_model_has_are_read_and_set_there() -> None:
    sampler = make()
    model: Any = sampler.model
    model.guidance = 1.0
    sampler.guidance = 2.0
    assert model.guidance == sampler.guidance == 2.0 and "guidance" not in vars(sampler)
    sampler.of_its_own = 3
    assert not hasattr(model, "of_its_own") and sampler.of_its_own == 3
    assert exactly(sampler, 1.0)
    layer = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match="modulation was a Linear .* another Linear now; the sampler is built again"):
        sampler.modulation = layer.eval()
        assert model.modulation is layer and exactly(sampler, 1.0)


def test_to_and_eval_reach_the_model() -> None:
    sampler = make()
    assert sampler.double() is sampler and next(sampler.model.parameters()).dtype is torch.float64
    assert exactly(sampler, 1.0, x=X.double())
    sampler.train()
    with pytest.raises(ValueError, match="training mode"):
        sampler(X.double(), torch.ones(2), Y)
    sampler.eval()
    assert exactly(sampler, 1.0, x=X.double())


def test_another_library_may_put_its_forward_and_its_hooks_on_it() -> None:
    sampler = make()
    old = sampler.forward

    def moved(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = old(*args, **kwargs)
        return out + 1

    sampler.forward = functools.update_wrapper(functools.partial(moved, sampler), old)
    with torch.no_grad():
        assert torch.equal(sampler(X, torch.ones(2), Y), sampler.model(X, torch.ones(2), Y) + 1)
    del sampler.forward
    handle = sampler.register_forward_hook(lambda _, __, out: out * 2)
    with torch.no_grad():
        assert torch.equal(sampler(X, torch.ones(2), Y), sampler.model(X, torch.ones(2), Y) * 2)
    handle.remove()
    assert exactly(sampler, 1.0)


def test_a_sampler_of_a_copy_is_independent() -> None:
    sampler = make()
    assert exactly(sampler, 1.0)
    model = copy.deepcopy(sampler.model)
    with torch.no_grad():
        model.get_parameter("time.weight").mul_(2)
    assert exactly(sampler, 1.0)


def test_it_fills_a_diffusers_pipelines_slot() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        num_layers=1,
        sample_size=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    ).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipeline = diffusers.DiTPipeline(model, vae.eval(), diffusers.DDIMScheduler())
    sampler = optimize_sampler(model, 2, mode="eager")
    pipeline.transformer = sampler
    assert pipeline.transformer is sampler and pipeline.components["transformer"] is sampler
    assert isinstance(sampler, nn.Module)
    assert sampler.config is model.config and sampler.dtype is model.dtype and sampler.device == model.device
    for name in ("_repeated_blocks", "_no_split_modules", "save_pretrained"):
        assert getattr(sampler, name) == getattr(model, name)
    pipeline.set_progress_bar_config(disable=True)

    def image(transformer: nn.Module) -> Any:
        pipeline.transformer = transformer
        generator = torch.Generator().manual_seed(0)
        return pipeline([1], num_inference_steps=3, generator=generator, output_type="np").images

    assert (image(sampler) == image(model)).all() and (image(sampler) == image(model)).all()
    assert len(sampler._programs) == 1  # what the pipeline notes on the model in between is no change
    pipeline.to(torch.float64)
    assert sampler.dtype is torch.float64


def test_the_cache_interface_of_diffusers_is_the_models() -> None:
    mixin: Any = pytest.importorskip("diffusers.models.cache_utils").CacheMixin

    class Cached(type(denoiser()), mixin):  # type: ignore[misc]
        pass

    sampler = optimize_sampler(Cached().eval(), 2, mode="eager")
    for _ in range(2):
        with sampler.cache_context("cond"):
            assert exactly(sampler, 1.0)
        sampler._reset_stateful_cache()  # registers an object on the model
    assert sampler._reset_stateful_cache == sampler.model._reset_stateful_cache
    assert len(sampler._programs) == 1
