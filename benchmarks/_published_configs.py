"""Configurations of published checkpoints, as far as they differ from the defaults of their class in diffusers, with
the call that their pipelines make: batch 1 where guidance is distilled or serial, 2 where it doubles the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

from fusion_compile._sampler.without_weights.diffusers_arguments import CallSizes


class Published(NamedTuple):
    """`steps`: what the pipeline takes by default."""

    class_name: str
    config: dict[str, Any]
    steps: int
    sizes: CallSizes = CallSizes()


_PIXART = {"caption_channels": 4096, "sample_size": 128}
_SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
_SERIAL = CallSizes(batch=1)

PUBLISHED = {
    "DiT-XL/2 256": Published("DiTTransformer2DModel", {"out_channels": 8}, 50),
    "PixArt-alpha 1024": Published("PixArtTransformer2DModel", _PIXART, 20),
    "PixArt-sigma 1024": Published(
        "PixArtTransformer2DModel", {**_PIXART, "use_additional_conditions": False, "interpolation_scale": 2}, 20
    ),
    "SD3-medium": Published("SD3Transformer2DModel", _SD3, 28),
    "SD3.5-medium": Published(
        "SD3Transformer2DModel",
        {**_SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        40,
    ),
    "SD3.5-large": Published(
        "SD3Transformer2DModel",
        {
            **_SD3,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
        },
        28,
    ),
    "Flux.1-dev": Published("FluxTransformer2DModel", {"guidance_embeds": True}, 28, _SERIAL),
    "Flux.2-dev": Published("Flux2Transformer2DModel", {}, 50, _SERIAL),
    "Chroma": Published("ChromaTransformer2DModel", {}, 35, _SERIAL),
    "StableAudio-open-1.0": Published("StableAudioDiTModel", {}, 100),
    "HunyuanDiT-1.2": Published(
        "HunyuanDiT2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 1408,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "sample_size": 128,
            "use_style_cond_and_image_meta_size": False,
        },
        50,
    ),
    "AuraFlow": Published("AuraFlowTransformer2DModel", {}, 50),
    "CogVideoX-2b": Published("CogVideoXTransformer3DModel", {}, 50),
    "CogVideoX-5b": Published(
        "CogVideoXTransformer3DModel",
        {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        50,
    ),
    "Wan2.1-1.3B": Published(
        "WanTransformer3DModel", {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}, 50, _SERIAL
    ),
    "Wan2.1-14B": Published("WanTransformer3DModel", {}, 50, _SERIAL),
    "Sana-1.6B": Published("SanaTransformer2DModel", {}, 20),
    "LTX-0.9": Published("LTXVideoTransformer3DModel", {}, 50),
    "HunyuanVideo": Published("HunyuanVideoTransformer3DModel", {}, 50, _SERIAL),
    "Qwen-Image": Published("QwenImageTransformer2DModel", {}, 50, _SERIAL),
    "CogView4-6B": Published(
        "CogView4Transformer2DModel",
        {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},
        50,
        _SERIAL,
    ),
    "Mochi": Published("MochiTransformer3DModel", {}, 64),
    "Z-Image": Published("ZImageTransformer2DModel", {}, 50, _SERIAL),
}
