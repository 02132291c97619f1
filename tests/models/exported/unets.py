"""UNets, the prior, and diffusers' general transformers."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.exported.spec import Exported, N, index, mask, noise, thousand, unit

_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


def _conditioned(t: float, **more: Any) -> dict[str, Any]:
    return {"sample": noise(4, 8, 8), "timestep": index(t), "encoder_hidden_states": noise(6, 12), **more}


def _sizes(width: int) -> dict[str, torch.Tensor]:
    return {"text_embeds": noise(8), "time_ids": torch.arange(float(N * 6)).reshape(N, 6)}


EXPORTED: dict[str, Exported] = {
    "UNet1DModel": Exported(
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 8, 16),
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "flip_sin_to_cos": False,
            "act_fn": "silu",
            "norm_num_groups": 4,
            "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D", "DownResnetBlock1D"),
            "up_block_types": ("UpResnetBlock1D", "UpResnetBlock1D"),
            "mid_block_type": "MidResTemporalBlock1D",
            "out_block_type": "OutConv1DBlock",
            "downsample_each_block": False,
        },
        lambda t: {"sample": noise(4, 16), "timestep": index(t)},
    ),
    "UNet2DModel": Exported(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "num_class_embeds": 5,
        },
        lambda t: {"sample": noise(3, 8, 8), "timestep": index(t), "class_labels": torch.tensor([1, 2])},
    ),
    "UNet2DConditionModel": Exported(
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8 + 6 * 4,
        },
        lambda t: _conditioned(t, added_cond_kwargs=_sizes(8)),
    ),
    "DreamLiteUNetModel": Exported(
        {
            **_UNET,
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        },
        _conditioned,
    ),
    "UNet3DConditionModel": Exported(
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda t: {**_conditioned(t), "sample": noise(4, 3, 8, 8)},
    ),
    "UNetMotionModel": Exported(
        {
            **{k: v for k, v in _UNET.items() if k != "attention_head_dim"},
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        lambda t: {**_conditioned(t), "sample": noise(4, 3, 8, 8), "encoder_hidden_states": torch.randn(N * 3, 6, 12)},
    ),
    "UNetSpatioTemporalConditionModel": Exported(
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 12,
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        lambda t: {
            "sample": noise(2, 8, 8, 8),
            "timestep": thousand(t),
            "encoder_hidden_states": noise(1, 12),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(N, 1),
        },
    ),
    "UNetControlNetXSModel": Exported(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "num_attention_heads": 2,
            "transformer_layers_per_block": 1,
            "ctrl_block_out_channels": (4, 8),
            "ctrl_conditioning_embedding_out_channels": (4, 4),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        lambda t: _conditioned(t, controlnet_cond=noise(3, 16, 16)),
    ),
    "I2VGenXLUNet": Exported(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "norm_num_groups": 2,
            "layers_per_block": 1,
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda t: {
            "sample": noise(4, 3, 8, 8),
            "timestep": index(t),
            "fps": torch.tensor([8, 8]),
            "image_latents": noise(4, 3, 8, 8),
            "image_embeddings": noise(12),
            "encoder_hidden_states": noise(6, 12),
        },
    ),
    "Kandinsky3UNet": Exported(
        {
            "time_embedding_dim": 8,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 3,
            "block_out_channels": (8, 16, 32, 64),
            "cross_attention_dim": 12,
            "encoder_hid_dim": 10,
        },
        lambda t: {
            "sample": noise(4, 8, 8),
            "timestep": index(t),
            "encoder_hidden_states": noise(6, 10),
            "encoder_attention_mask": mask(6),
        },
    ),
    "StableCascadeUNet": Exported(
        {
            "in_channels": 4,
            "out_channels": 4,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "timestep_ratio_embedding_dim": 8,
            "clip_text_in_channels": 8,
            "clip_text_pooled_in_channels": 8,
            "clip_image_in_channels": 8,
            "clip_seq": 2,
            "switch_level": (False,),
            "kernel_size": 3,
            "self_attn": True,
            "timestep_conditioning_type": ("sca", "crp"),
        },
        lambda t: {
            "sample": noise(4, 8, 8),
            "timestep_ratio": unit(t),
            "clip_text_pooled": noise(1, 8),
            "clip_text": noise(6, 8),
            "clip_img": noise(1, 8),
        },
    ),
    "UVit2DModel": Exported(
        {
            "hidden_size": 16,
            "cond_embed_dim": 12,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 12,
            "vocab_size": 33,
            "codebook_size": 32,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sample_size": 8,
        },
        lambda t: {
            "input_ids": torch.randint(0, 32, (N, 8, 8)),
            "encoder_hidden_states": noise(6, 12),
            "pooled_text_emb": noise(12),
            "micro_conds": torch.arange(float(N * 5)).reshape(N, 5),
        },
    ),
    "PriorTransformer": Exported(
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": 12, "num_embeddings": 6},
        lambda t: {
            "hidden_states": noise(12),
            "timestep": index(t),
            "proj_embedding": noise(12),
            "encoder_hidden_states": noise(6, 12),
            "attention_mask": mask(6).bool(),
        },
    ),
    "Transformer2DModel": Exported(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "ada_norm_zero",
            "num_embeds_ada_norm": 10,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_elementwise_affine": False,
        },
        lambda t: {"hidden_states": noise(4, 8, 8), "timestep": index(t), "class_labels": torch.tensor([1, 2])},
    ),
    "DreamLiteTransformer2DModel": Exported(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 8,
            "num_layers": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
        },
        lambda t: {"hidden_states": noise(8, 8, 8), "timestep": index(t), "encoder_hidden_states": noise(6, 12)},
    ),
    "TransformerTemporalModel": Exported(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 8,
            "num_layers": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
        },
        lambda t: {"hidden_states": noise(8, 4, 4), "timestep": index(t), "num_frames": 2},
    ),
    "T5FilmDecoder": Exported(
        {
            "input_dims": 8,
            "targets_length": 6,
            "d_model": 16,
            "num_layers": 1,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 16,
            "max_decoder_noise_time": 1000.0,
        },
        lambda t: {
            "encodings_and_masks": [(noise(4, 16), mask(4).float())],
            "decoder_input_tokens": noise(6, 8),
            "decoder_noise_time": unit(t),
        },
    ),
}
