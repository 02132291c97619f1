"""Transformers of videos."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.exported.spec import Exported, N, index, mask, noise, thousand, unit

_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "text_embed_dim": 12,
    "rope_axes_dim": (4, 4, 8),
}


def _wan(t: float, **more: Any) -> dict[str, Any]:
    video = noise(4, 2, 8, 8)
    return {"hidden_states": video, "timestep": thousand(t), "encoder_hidden_states": noise(6, 10), **more}


def _cog(t: float, **more: Any) -> dict[str, Any]:
    video = noise(2, 4, 8, 8)
    return {"hidden_states": video, "timestep": index(t), "encoder_hidden_states": noise(6, 10), **more}


def _kandinsky(t: float, channels: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 4, channels),
        "encoder_hidden_states": noise(6, 12),
        "timestep": thousand(t),
        "pooled_projections": noise(8),
    }


EXPORTED: dict[str, Exported] = {
    "AllegroTransformer3DModel": Exported(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "cross_attention_dim": 24,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
            "caption_channels": 10,
        },
        lambda t: {
            "hidden_states": noise(4, 2, 8, 8),
            "encoder_hidden_states": noise(6, 10),
            "timestep": index(t),
            "attention_mask": torch.ones(N, 2, 8, 8),
            "encoder_attention_mask": mask(6),
            "image_rotary_emb": (
                tuple((torch.ones(n, 4), torch.arange(4.0 * n).reshape(n, 4) / 10) for n in (2, 4, 4)),
                tuple((torch.arange(32) // step % n)[None] for step, n in ((16, 2), (4, 4), (1, 4))),
            ),
        },
    ),
    "AnyFlowTransformer3DModel": Exported(
        _WAN,
        lambda t: _wan(
            t,
            hidden_states=noise(2, 4, 8, 8),
            timestep=thousand(t)[:, None].expand(N, 2),
            r_timestep=thousand(t / 2)[:, None].expand(N, 2),
        ),
    ),
    "AnyFlowFARTransformer3DModel": Exported(
        {**_WAN, "chunk_partition": (1, 1), "full_chunk_limit": 2},
        lambda t: {
            **_wan(t),
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": thousand(t)[:, None].expand(N, 2),
            "r_timestep": thousand(t / 2)[:, None].expand(N, 2),
            "chunk_partition": [1, 1],
        },
    ),
    "ChronoEditTransformer3DModel": Exported(_WAN, _wan),
    "SkyReelsV2Transformer3DModel": Exported(_WAN, lambda t: _wan(t, timestep=index(t))),
    "WanVACETransformer3DModel": Exported(
        {**_WAN, "vace_layers": [0], "vace_in_channels": 6},
        lambda t: _wan(t, control_hidden_states=noise(6, 2, 8, 8)),
    ),
    "WanAnimateTransformer3DModel": Exported(
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 10,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda t: _wan(
            t,
            hidden_states=noise(12, 3, 8, 8),
            encoder_hidden_states_image=noise(4, 10),
            pose_hidden_states=noise(4, 2, 8, 8),
            face_pixel_values=noise(3, 5, 16, 16),
        ),
    ),
    "ConsisIDTransformer3DModel": Exported(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 4,
            "text_embed_dim": 10,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 4,
            "LFE_vit_dim": 4,
            "LFE_depth": 5,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda t: _cog(t, id_cond=noise(4), id_vit_hidden=[noise(2, 4)]),
    ),
    "CosmosTransformer3DModel": Exported(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "text_embed_dim": 10,
            "adaln_lora_dim": 4,
            "max_size": (4, 8, 8),
            "concat_padding_mask": False,
        },
        lambda t: {
            "hidden_states": noise(4, 2, 8, 8),
            "timestep": unit(t),
            "encoder_hidden_states": noise(6, 10),
            "fps": 16,
        },
    ),
    "Cosmos3OmniTransformer": Exported(
        {
            "head_dim": 12,
            "hidden_size": 24,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "vocab_size": 32,
            "rope_axes_dim": [2, 2, 2],
        },
        lambda t: {
            "input_ids": torch.tensor([1, 2]),
            "text_indexes": torch.tensor([0, 1]),
            "position_ids": torch.arange(6).expand(3, 6),
            "und_len": 2,
            "sequence_length": 6,
            "vision_tokens": [torch.randn(1, 2, 1, 2, 2)],
            "vision_token_shapes": [(1, 2, 2)],
            "vision_sequence_indexes": torch.arange(2, 6),
            "vision_mse_loss_indexes": torch.arange(2, 6),
            "vision_timesteps": torch.full((4,), t),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
    ),
    "EasyAnimateTransformer3DModel": Exported(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 1,
            "mmdit_layers": 1,
            "time_embed_dim": 4,
            "text_embed_dim": 10,
        },
        lambda t: {
            "hidden_states": noise(4, 2, 8, 8),
            "timestep": thousand(t),
            "encoder_hidden_states": noise(6, 10),
        },
    ),
    "HeliosTransformer3DModel": Exported(
        {**{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        lambda t: {
            **_wan(t),
            "timestep": index(t),
            "indices_hidden_states": torch.arange(2).expand(N, -1) + 3,
            "indices_latents_history_short": torch.tensor([[2]]).expand(N, -1),
            "indices_latents_history_mid": torch.tensor([[0, 1]]).expand(N, -1),
            "indices_latents_history_long": torch.tensor([[0, 0, 0, 0]]).expand(N, -1),
            "latents_history_short": noise(4, 1, 8, 8),
            "latents_history_mid": noise(4, 2, 8, 8),
            "latents_history_long": noise(4, 4, 8, 8),
        },
    ),
    "HunyuanVideo15Transformer3DModel": Exported(
        {**_HUNYUAN, "num_refiner_layers": 1, "text_embed_2_dim": 8, "image_embed_dim": 8, "use_meanflow": True},
        lambda t: {
            "hidden_states": noise(4, 1, 8, 8),
            "timestep": thousand(t),
            "timestep_r": thousand(t / 2),
            "encoder_hidden_states": noise(6, 12),
            "encoder_attention_mask": mask(6),
            "encoder_hidden_states_2": noise(4, 8),
            "encoder_attention_mask_2": mask(4),
            "image_embeds": torch.zeros(N, 3, 8),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Exported(
        {
            **_HUNYUAN,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "pooled_projection_dim": 8,
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
        },
        lambda t: {
            "hidden_states": torch.randn(1, 4, 3, 4, 4),
            "timestep": thousand(t)[:1],
            "encoder_hidden_states": torch.randn(1, 6, 12),
            "encoder_attention_mask": mask(6)[:1],
            "pooled_projections": torch.randn(1, 8),
            "image_embeds": torch.randn(1, 3, 8),
            "indices_latents": torch.arange(3) + 6,
            "guidance": torch.tensor([6000.0]),
            "latents_clean": torch.randn(1, 4, 2, 4, 4),
            "indices_latents_clean": torch.tensor([0, 2]),
            "latents_history_2x": torch.randn(1, 4, 2, 4, 4),
            "indices_latents_history_2x": torch.tensor([0, 1]),
            "latents_history_4x": torch.randn(1, 4, 4, 4, 4),
            "indices_latents_history_4x": torch.tensor([0, 0, 1, 1]),
        },
    ),
    "Kandinsky5Transformer3DModel": Exported(
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 8,
            "time_dim": 8,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 4, 8),
        },
        lambda t: {
            **_kandinsky(t, 4),
            "visual_rope_pos": (torch.arange(2), torch.arange(2), torch.arange(2)),
            "text_rope_pos": torch.arange(6),
        },
    ),
    "Kandinsky6Transformer3DModel": Exported(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 4, 8),
            "in_audio_dim": 5,
            "out_audio_dim": 5,
        },
        lambda t: {**_kandinsky(t, 9), "audio_hidden_states": noise(3, 5)},
    ),
    "Kandinsky6SRTransformer3DModel": Exported(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 8,
            "model_dim": 32,
            "ff_dim": 32,
            "num_visual_blocks": 1,
            "axes_dims": (4, 4, 8),
            "nabla_window": (1, 1, 1),
        },
        lambda t: {"hidden_states": noise(1, 8, 8, 9), "timestep": thousand(t)},
    ),
    "LatteTransformer3DModel": Exported(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 10,
            "video_length": 2,
        },
        lambda t: {
            "hidden_states": noise(4, 2, 8, 8),
            "timestep": index(t),
            "encoder_hidden_states": noise(6, 10),
        },
    ),
    "MotifVideoTransformer3DModel": Exported(
        {**_HUNYUAN, "in_channels": 9, "num_single_layers": 1, "image_embed_dim": 8},
        lambda t: {
            "hidden_states": noise(9, 1, 8, 8),
            "timestep": index(t),
            "encoder_hidden_states": noise(6, 12),
            "encoder_attention_mask": mask(6),
            "image_embeds": noise(3, 8),
        },
    ),
    "SanaVideoTransformer3DModel": Exported(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 10,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        lambda t: {
            "hidden_states": noise(4, 2, 8, 8),
            "encoder_hidden_states": noise(6, 10),
            "timestep": index(t),
            "encoder_attention_mask": mask(6),
        },
    ),
    "SanaWMTransformer3DModel": Exported(
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 1,
            "image_size": 64,
            "caption_channels": 10,
        },
        lambda t: {
            "hidden_states": noise(4, 2, 4, 4),
            "timestep": torch.full((N, 1, 2), round(999 * t)),
            "encoder_hidden_states": noise(1, 6, 10),
            "encoder_attention_mask": mask(6),
            "camera_conditions": torch.rand(N, 2, 20),
            "chunk_plucker": noise(6, 2, 4, 4),
        },
    ),
}
