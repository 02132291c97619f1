"""Denoisers that diffusers exports beside their pipelines, and one that reads a reference from an object."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.exported.spec import Exported, N, index, mask, noise, unit

_HEADS, _WIDTH, _TOKENS = 2, 24, 16


def _referring(t: float) -> dict[str, Any]:
    """Wan-Animate-2 after its reference pass: the keys and values of the reference lie in an object."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(1)
    kept = (1, _TOKENS, _HEADS, _WIDTH // _HEADS)
    cache.get(0).store(torch.randn(kept), torch.randn(kept))

    def video() -> list[Tensor]:
        return [torch.randn(4, 1, 8, 8)]

    return {
        "hidden_states": video(),
        "timestep": unit(t)[:1],
        "encoder_hidden_states": [torch.randn(5, 10)],
        "condition_latents": video(),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": _TOKENS,
        "reference_grid_sizes": torch.tensor([[1, 4, 4]]),
        "origin_len": 1,
        "origin_area": [64, 64],
    }


EXPORTED: dict[str, Exported] = {
    "AudioLDM2UNet2DConditionModel": Exported(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "cross_attention_dim": ((None, 12, 10), (None, 12, 10)),
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        lambda t: {
            "sample": noise(4, 8, 8),
            "timestep": index(t),
            "encoder_hidden_states": noise(6, 12),
            "encoder_attention_mask": mask(6),
            "encoder_hidden_states_1": noise(5, 10),
            "encoder_attention_mask_1": mask(5),
        },
    ),
    "UniDiffuserModel": Exported(
        {
            "text_dim": 12,
            "clip_img_dim": 10,
            "num_text_tokens": 6,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu",
            "num_embeds_ada_norm": 1000,
            "norm_type": "unidiffuser",
            "block_type": "unidiffuser",
            "use_timestep_embedding": False,
            "use_data_type_embedding": True,
        },
        lambda t: {
            "latent_image_embeds": noise(4, 8, 8),
            "image_embeds": noise(1, 10),
            "prompt_embeds": noise(6, 12),
            "timestep_img": index(t),
            "timestep_text": torch.zeros(N, dtype=torch.int64),
        },
    ),
    "WanAnimate2Transformer3DModel": Exported(
        {
            "in_dim": 8,
            "dim": _WIDTH,
            "ffn_dim": 16,
            "freq_dim": 8,
            "text_dim": 10,
            "text_len": 6,
            "out_dim": 4,
            "num_heads": _HEADS,
            "num_layers": 1,
            "use_img_emb": False,
        },
        _referring,
    ),
}
