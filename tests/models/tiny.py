"""Tiny configurations of diffusers' transformers, each with a call that fits it: at most some 100,000 weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from fusion_compile._sampler.without_weights.diffusers_arguments import CallSizes
from fusion_compile._sampler.without_weights.diffusers_calls import ExampleCall, example_call, model_of_class


class Tiny(NamedTuple):
    """A class of diffusers, what it is configured with, and the size of its call."""

    class_name: str
    config: dict[str, Any]
    sizes: CallSizes = CallSizes(height=8, text=6)


_PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,  # a width of 3 * 8: the sizes' embedding takes a third for each of its numbers
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 12,
    "sample_size": 8,
}

TINY = {
    "DiT": Tiny(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 4,
        },
    ),
    "PixArt-alpha": Tiny("PixArtTransformer2DModel", {**_PIXART, "use_additional_conditions": True}),
    "PixArt-sigma": Tiny("PixArtTransformer2DModel", {**_PIXART, "use_additional_conditions": False}),
    "SD3": Tiny(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    "Flux": Tiny(
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
    "Flux.2": Tiny(
        "Flux2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
    "Chroma": Tiny(
        "ChromaTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
    ),
    "StableAudio": Tiny(
        "StableAudioDiTModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": 10,
            "cross_attention_input_dim": 12,
        },
    ),
    "HunyuanDiT": Tiny(
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 16,
            "num_layers": 4,
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 5,
            "text_len_t5": 6,
        },
    ),
    "AuraFlow": Tiny(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
    ),
    "CogVideoX": Tiny(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 10,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
            "use_rotary_positional_embeddings": True,
        },
    ),
    "Wan": Tiny(
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 10,
            "ffn_dim": 32,
            "freq_dim": 16,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        CallSizes(height=8, width=8, frames=2, text=6),
    ),
    "Sana": Tiny(
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
        },
    ),
    "LTX": Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
        },
        CallSizes(height=4, width=4, frames=2, text=6),
    ),
    "HunyuanVideo": Tiny(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 12,
            "pooled_projection_dim": 10,
            "rope_axes_dim": (4, 4, 8),
        },
        CallSizes(height=8, width=8, frames=1, text=6),
    ),
    "Qwen-Image": Tiny(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
    "CogView4": Tiny(
        "CogView4Transformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
    ),
    "Mochi": Tiny(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": 6,
        },
        CallSizes(height=8, width=8, frames=2),
    ),
    "Z-Image": Tiny(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 4, 8],
            "axes_lens": [64, 16, 16],
        },
    ),
    "Lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "axes_dim_rope": (2, 2, 4),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 12,
        },
    ),
}


def tiny_model(name: str) -> nn.Module:
    """Weights that are random and nowhere zero: the zeros that gates start with would hide every error behind them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_of_class(TINY[name].class_name, TINY[name].config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
    return copy.deepcopy(model)  # a buffer may be a view, as SD3's positions are, and its base would hold its memory


def tiny_call(name: str, model: nn.Module, n_steps: int, batch: int = 2) -> ExampleCall:
    """One call of `model`, another each time."""
    return example_call(model, n_steps, dataclasses.replace(TINY[name].sizes, batch=batch))
