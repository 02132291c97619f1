"""ControlNet residuals are live, images of IP-adapters and T2I-adapters belong to the request, and both are exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import fusion_compile as fc
from fusion_compile.passes._compat import tree_leaves
from tests.models.exported.run import EXPORTED

# diffusers imports its own deprecated names.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in version:FutureWarning")

TIMES = (0.9, 0.5, 0.1)


def made(name: str, **config: Any) -> Any:
    """The class at tiny size, weights random and nowhere zero."""
    import diffusers

    return randomised(getattr(diffusers, name)(**{**EXPORTED[name].config, **config}))


def randomised(model: Any) -> Any:
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model


def unet() -> Any:
    return made("UNet2DConditionModel", addition_embed_type=None, projection_class_embeddings_input_dim=None)


def flux() -> Any:
    import diffusers

    return randomised(
        diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(4, 4, 8),
        )
    )


def flux_call(t: float, text: Tensor, pooled: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 4),
        "timestep": torch.full((2,), t),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }


def unet_call(t: float, text: Tensor, **more: Any) -> dict[str, Any]:
    time = torch.full((2,), round(999 * t))
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": time, "encoder_hidden_states": text, **more}


def sampler_of(model: nn.Module) -> fc.Sampler:
    return fc.optimize_sampler(model, len(TIMES), mode="eager")


def differs(sampler: fc.Sampler, call: dict[str, Any]) -> float:
    """The largest difference of an output to the model's, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = sampler(**call)
    pairs = zip(tree_leaves(got), tree_leaves(sampler.model(**call)), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def requests(n: int = 2) -> Iterator[Tensor]:
    for _ in range(n):
        yield torch.randn(2, 6, 12)


def test_a_controlnet_and_the_unet_that_it_steers_are_both_hoisted() -> None:
    from diffusers import ControlNetModel

    steered = unet()
    steering = randomised(ControlNetModel.from_unet(steered, conditioning_embedding_out_channels=(4, 4)))
    sampler, control = sampler_of(steered), sampler_of(steering)
    for text in requests():
        image = torch.randn(2, 3, 16, 16)
        for t in TIMES:
            asked = unet_call(t, text, controlnet_cond=image, conditioning_scale=0.7, return_dict=False)
            assert differs(control, asked) == 0
            down, middle = control(**asked)
            call = unet_call(t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle)
            assert differs(sampler, call) == 0
    roles = str(sampler.report)
    assert "down_block_additional_residuals=live" in roles and "mid_block_additional_residual=live" in roles
    assert "controlnet_cond=request" in str(control.report)
    assert sampler.release_weights(to="drop") > 0 and control.release_weights(to="drop") > 0


@pytest.mark.filterwarnings("error")
def test_a_t2i_adapter_is_of_the_request() -> None:
    """Its pipeline gives clones of the same features at each step."""
    sampler = sampler_of(unet())
    for text in requests():
        features = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)]
        for t in TIMES:
            call = unet_call(t, text)
            mine, own = ([f.clone() for f in features] for _ in range(2))  # the model takes them off its list
            got = sampler(**call, down_intrablock_additional_residuals=mine).sample
            assert torch.equal(got, sampler.model(**call, down_intrablock_additional_residuals=own).sample)
            assert mine == own == []
    assert "down_intrablock_additional_residuals=request" in str(sampler.report)


@pytest.mark.parametrize("masked", [False, True])
def test_an_ip_adapter_of_a_unet_is_of_the_request_and_its_scale_is_followed(masked: bool) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model = unet()
    own = {}
    for name in model.attn_processors:
        width = 16 if name.startswith("mid_block") else 8
        own[name] = (
            AttnProcessor2_0() if "attn1" in name else IPAdapterAttnProcessor2_0(width, 12, num_tokens=(4,), scale=0.8)
        )
    model.set_attn_processor(own)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(10, 12, num_image_text_embeds=4)])
    model.config.encoder_hid_dim_type = "ip_image_proj"
    randomised(model)
    more = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}} if masked else {}
    sampler = sampler_of(model)
    for text in requests():
        image = torch.randn(2, 1, 10)
        for t in TIMES:
            assert differs(sampler, unet_call(t, text, added_cond_kwargs={"image_embeds": [image]}, **more)) == 0
    assert "added_cond_kwargs=request" in str(sampler.report) and len(sampler.report.programs) == 1
    call = unet_call(0.5, text, added_cond_kwargs={"image_embeds": [image]}, **more)
    before = model(**call)[0]
    for processor in model.attn_processors.values():  # as set_ip_adapter_scale does
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale = [0.1]
    with pytest.warns(UserWarning, match="scale.*the sampler is built again"):
        got = sampler(**call)[0]
    assert torch.equal(got, model(**call)[0]) and not torch.equal(got, before)


def test_an_ip_adapter_and_a_controlnet_of_flux() -> None:
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = flux()
    own = {
        name: FluxIPAdapterAttnProcessor(32, 12, num_tokens=(4,), scale=0.8) if "single" not in name else processor
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(own)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(10, 12, num_image_text_embeds=4)])
    randomised(model)
    sampler = sampler_of(model)
    for _ in range(2):
        text, pooled, image = torch.randn(2, 3, 12), torch.randn(2, 10), torch.randn(2, 1, 10)
        for t in TIMES:
            call = flux_call(t, text, pooled)
            call["joint_attention_kwargs"] = {"ip_adapter_image_embeds": [image]}
            call["controlnet_block_samples"] = [torch.randn(2, 4, 32)]
            call["controlnet_single_block_samples"] = (torch.randn(2, 4, 32),)
            assert differs(sampler, call) == 0
    roles = str(sampler.report)
    assert "joint_attention_kwargs=request" in roles and "controlnet_block_samples=live" in roles
    assert sampler.release_weights(to="drop") > 0


@pytest.mark.exhaustive
def test_an_ip_adapter_of_sd3_which_hears_the_time() -> None:
    """Its images are resampled anew at each step: a row of the request and the step."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    from tests.models.tiny import tiny_model

    model: Any = tiny_model("SD3")
    own = {
        name: SD3IPAdapterJointAttnProcessor2_0(16, 12, 8, 16, scale=0.8) if ".attn2." not in name else processor
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(own)
    model.image_proj = IPAdapterTimeImageProjection(10, 12, 16, 1, 8, 2, 4, 2, timestep_in_dim=8)
    randomised(model)
    sampler = sampler_of(model)
    for _ in range(2):
        text, pooled, image = torch.randn(2, 3, 12), torch.randn(2, 10), torch.randn(2, 5, 10)
        for t in TIMES:
            call = {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "timestep": torch.full((2,), 1000 * t),
                "encoder_hidden_states": text,
                "pooled_projections": pooled,
                "joint_attention_kwargs": {"ip_adapter_image_embeds": image},
                "return_dict": False,
            }
            assert differs(sampler, call) == 0
    assert "joint_attention_kwargs=request" in str(sampler.report) and len(sampler.report.programs) == 1
    assert sampler.report.programs[0].nodes["step_request"] > 0
    assert sampler.release_weights(to="drop") > 0
