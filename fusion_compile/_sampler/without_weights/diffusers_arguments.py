"""Make up the arguments of one call of each transformer class of diffusers, as its pipeline passes them.

Contents are random. Everything is made by factories on the model's device, so that a model of meta tensors gets meta
tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Clock = Literal["index", "thousand", "unit"]
"""The timesteps that a pipeline passes: int64 in 0..999, floats in 0..1000, or floats in 0..1."""

TIMESTEP = object()
"""Stands for the timestep in a family's arguments."""


@dataclass(frozen=True)
class CallSizes:
    """Sizes of a call; None is the usual size of the class, for latents, frames and text tokens."""

    batch: int = 2
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    text: int | None = None


class Maker:
    """Makes random tensors in the model's device and dtype, with the sizes of the call."""

    def __init__(self, model: nn.Module, sizes: CallSizes) -> None:
        weights = Counter[tuple[torch.device, torch.dtype]]()
        for weight in filter(Tensor.is_floating_point, model.parameters()):
            weights[weight.device, weight.dtype] += weight.numel()
        ((self.device, self.dtype), _), *_ = weights.most_common(1)  # a class may keep some in float32
        self.model, self.sizes, self.batch = model, sizes, sizes.batch
        self.config: Any = model.config

    def latent(self, usual: int) -> tuple[int, int]:
        height = self.sizes.height or usual
        return height, self.sizes.width or self.sizes.height or usual

    def frames(self, usual: int) -> int:
        return self.sizes.frames or usual

    def text(self, usual: int) -> int:
        return self.sizes.text or usual

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def labels(self, n: int) -> Tensor:
        return torch.randint(0, n, (self.batch,), device=self.device)

    def mask(self, tokens: int, dtype: torch.dtype | None = None) -> Tensor:
        """A mask that hides the last fifth of the tokens."""
        return (
            (torch.arange(tokens, device=self.device) < tokens - tokens // 5)
            .expand(self.batch, -1)
            .to(dtype or self.dtype, copy=True)
        )

    def full(self, value: float) -> Tensor:
        return torch.full((self.batch,), value, device=self.device, dtype=self.dtype)

    def rows(self, *values: float, dtype: torch.dtype | None = None) -> Tensor:
        """``[B, len(values)]``, made without a copy from the CPU, which a meta tensor cannot take."""
        columns = [torch.full((self.batch, 1), v, device=self.device, dtype=dtype or self.dtype) for v in values]
        return torch.cat(columns, dim=1)

    def grid_ids(self, height: int, width: int, axes: int) -> Tensor:
        """``[height * width, axes]`` positions, with row and column in axes 1 and 2."""
        y = torch.arange(height, device=self.device)[:, None].expand(-1, width)
        x = torch.arange(width, device=self.device)[None, :].expand(height, -1)
        nothing = torch.zeros_like(y)
        return torch.stack([nothing, y, x, *[nothing] * (axes - 3)], dim=-1).reshape(-1, axes).to(self.dtype)

    def rotary(self, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[tokens, dim]``, float32, each frequency in two columns."""
        frequencies = 10000.0 ** (-torch.arange(dim // 2, device=self.device, dtype=torch.float32) * 2 / dim)
        angles = torch.arange(tokens, device=self.device, dtype=torch.float32)[:, None] * frequencies
        return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)


def _dit(m: Maker) -> dict[str, Any]:
    height, width = m.latent(m.config.sample_size)
    return {
        "hidden_states": m.randn(m.batch, m.config.in_channels, height, width),
        "timestep": TIMESTEP,
        "class_labels": m.labels(m.config.num_embeds_ada_norm + 1),  # the last is the null class
    }


def _pixart(m: Maker) -> dict[str, Any]:
    height, width = m.latent(m.config.sample_size)
    tokens = m.text(120 if m.model.use_additional_conditions else 300)
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if m.model.use_additional_conditions:
        size = {"resolution": m.rows(8 * height, 8 * width), "aspect_ratio": m.rows(height / width)}
    return {
        "hidden_states": m.randn(m.batch, m.config.in_channels, height, width),
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.caption_channels),
        "encoder_attention_mask": m.mask(tokens, torch.int64),
        "timestep": TIMESTEP,
        "added_cond_kwargs": size,
    }


def _sd3(m: Maker) -> dict[str, Any]:
    return {
        "hidden_states": m.randn(m.batch, m.config.in_channels, *m.latent(m.config.sample_size)),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, m.text(333), m.config.joint_attention_dim),
        "pooled_projections": m.randn(m.batch, m.config.pooled_projection_dim),
    }


def _flux(m: Maker) -> dict[str, Any]:
    height, width = m.latent(128)
    height, width, tokens = height // 2, width // 2, m.text(512)
    axes = len(m.config.axes_dims_rope)
    arguments = {
        "hidden_states": m.randn(m.batch, height * width, m.config.in_channels),
        "timestep": TIMESTEP,
        "pooled_projections": m.randn(m.batch, m.config.pooled_projection_dim),
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.joint_attention_dim),
        "txt_ids": torch.zeros(tokens, axes, device=m.device, dtype=m.dtype),
        "img_ids": m.grid_ids(height, width, axes),
    }
    return arguments | ({"guidance": m.full(3.5)} if m.config.guidance_embeds else {})


def _flux2(m: Maker) -> dict[str, Any]:
    height, width = m.latent(128)
    height, width, tokens = height // 2, width // 2, m.text(512)
    axes = len(m.config.axes_dims_rope)
    text_ids = torch.zeros(tokens, axes, device=m.device)
    text_ids[:, -1] = torch.arange(tokens, device=m.device)
    arguments = {
        "hidden_states": m.randn(m.batch, height * width, m.config.in_channels),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.joint_attention_dim),
        "txt_ids": text_ids.expand(m.batch, -1, -1).clone(),
        "img_ids": m.grid_ids(height, width, axes).float().expand(m.batch, -1, -1).clone(),
    }
    return arguments | ({"guidance": m.full(4.0)} if m.config.guidance_embeds else {})


def _chroma(m: Maker) -> dict[str, Any]:
    height, width = m.latent(128)
    height, width, tokens = height // 2, width // 2, m.text(512)
    axes = len(m.config.axes_dims_rope)
    image = torch.ones(m.batch, height * width, device=m.device, dtype=m.dtype)
    return {
        "hidden_states": m.randn(m.batch, height * width, m.config.in_channels),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.joint_attention_dim),
        "txt_ids": torch.zeros(tokens, axes, device=m.device, dtype=m.dtype),
        "img_ids": m.grid_ids(height, width, axes),
        "attention_mask": torch.cat([m.mask(tokens), image], dim=1),
    }


def _stable_audio(m: Maker) -> dict[str, Any]:
    length = m.sizes.width or m.config.sample_size
    return {
        "hidden_states": m.randn(m.batch, m.config.in_channels, length),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, m.text(130), m.config.cross_attention_input_dim),
        "global_hidden_states": m.randn(m.batch, 1, m.config.global_states_input_dim),
        "rotary_embedding": m.rotary(length + 1, m.config.attention_head_dim // 2),
    }


def _hunyuan_dit(m: Maker) -> dict[str, Any]:
    height, width = m.latent(128)
    tokens = (height // m.config.patch_size) * (width // m.config.patch_size)
    arguments = {
        "hidden_states": m.randn(m.batch, m.config.in_channels, height, width),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, m.config.text_len, m.config.cross_attention_dim),
        "text_embedding_mask": m.mask(m.config.text_len, torch.int64),
        "encoder_hidden_states_t5": m.randn(m.batch, m.config.text_len_t5, m.config.cross_attention_dim_t5),
        "text_embedding_mask_t5": m.mask(m.config.text_len_t5, torch.int64),
        "image_rotary_emb": m.rotary(tokens, m.config.attention_head_dim),
    }
    if m.config.use_style_cond_and_image_meta_size:
        side = (8 * height, 8 * width)
        arguments |= {"image_meta_size": m.rows(*side, *side, 0, 0), "style": m.rows(0, dtype=torch.int64)[:, 0]}
    return arguments


def _auraflow(m: Maker) -> dict[str, Any]:
    return {
        "hidden_states": m.randn(m.batch, m.config.in_channels, *m.latent(128)),
        "encoder_hidden_states": m.randn(m.batch, m.text(256), m.config.joint_attention_dim),
        "timestep": TIMESTEP,
    }


def _cogvideox(m: Maker) -> dict[str, Any]:
    height, width = m.sizes.height or m.config.sample_height, m.sizes.width or m.config.sample_width
    frames = m.frames((m.config.sample_frames - 1) // m.config.temporal_compression_ratio + 1)
    arguments = {
        "hidden_states": m.randn(m.batch, frames, m.config.in_channels, height, width),
        "encoder_hidden_states": m.randn(m.batch, m.config.max_text_seq_length, m.config.text_embed_dim),
        "timestep": TIMESTEP,
    }
    if m.config.use_rotary_positional_embeddings:
        grid = (height // m.config.patch_size) * (width // m.config.patch_size)
        arguments["image_rotary_emb"] = m.rotary(frames * grid, m.config.attention_head_dim)
    return arguments


def _wan(m: Maker) -> dict[str, Any]:
    height, width = m.sizes.height or 60, m.sizes.width or 104
    arguments = {
        "hidden_states": m.randn(m.batch, m.config.in_channels, m.frames(21), height, width),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, m.text(512), m.config.text_dim),
    }
    if m.config.image_dim is not None:
        arguments["encoder_hidden_states_image"] = m.randn(m.batch, 257, m.config.image_dim)
    return arguments


def _sana(m: Maker) -> dict[str, Any]:
    tokens = m.text(300)
    arguments = {
        "hidden_states": m.randn(m.batch, m.config.in_channels, *m.latent(m.config.sample_size)),
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.caption_channels),
        "encoder_attention_mask": m.mask(tokens, torch.int64),
        "timestep": TIMESTEP,
    }
    return arguments | ({"guidance": m.full(4.5)} if m.config.guidance_embeds else {})


def _ltx(m: Maker) -> dict[str, Any]:
    frames, height, width = m.frames(21), m.sizes.height or 16, m.sizes.width or 24
    tokens = m.text(128)
    return {
        "hidden_states": m.randn(m.batch, frames * height * width, m.config.in_channels),
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.caption_channels),
        "timestep": TIMESTEP,
        "encoder_attention_mask": m.mask(tokens, torch.int64),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _hunyuan_video(m: Maker) -> dict[str, Any]:
    height, width, tokens = m.sizes.height or 68, m.sizes.width or 120, m.text(256)
    arguments = {
        "hidden_states": m.randn(m.batch, m.config.in_channels, m.frames(9), height, width),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.text_embed_dim),
        "encoder_attention_mask": m.mask(tokens, torch.int64),
        "pooled_projections": m.randn(m.batch, m.config.pooled_projection_dim),
    }
    return arguments | ({"guidance": m.full(6000.0)} if m.config.guidance_embeds else {})


def _qwen(m: Maker) -> dict[str, Any]:
    height, width = m.latent(128)
    height, width, tokens = height // 2, width // 2, m.text(512)
    arguments = {
        "hidden_states": m.randn(m.batch, height * width, m.config.in_channels),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.joint_attention_dim),
        "encoder_hidden_states_mask": m.mask(tokens, torch.int64),
        "img_shapes": [[(1, height, width)]] * m.batch,
    }
    return arguments | ({"guidance": m.full(4.0)} if m.config.guidance_embeds else {})


def _cogview4(m: Maker) -> dict[str, Any]:
    height, width = m.latent(m.config.sample_size)
    size = m.rows(8 * height, 8 * width)
    return {
        "hidden_states": m.randn(m.batch, m.config.in_channels, height, width),
        "encoder_hidden_states": m.randn(m.batch, m.text(224), m.config.text_embed_dim),
        "timestep": TIMESTEP,
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": m.rows(0, 0),
    }


def _mochi(m: Maker) -> dict[str, Any]:
    height, width = m.sizes.height or 60, m.sizes.width or 106
    tokens = m.config.max_sequence_length
    return {
        "hidden_states": m.randn(m.batch, m.config.in_channels, m.frames(4), height, width),
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.text_embed_dim),
        "timestep": TIMESTEP,
        "encoder_attention_mask": m.mask(tokens, torch.bool),
    }


def _z_image(m: Maker) -> dict[str, Any]:
    height, width = m.latent(128)
    return {
        "x": [m.randn(m.config.in_channels, 1, height, width) for _ in range(m.batch)],
        "t": TIMESTEP,
        "cap_feats": [m.randn(m.text(128), m.config.cap_feat_dim) for _ in range(m.batch)],
    }


def _lumina2(m: Maker) -> dict[str, Any]:
    tokens = m.text(256)
    return {
        "hidden_states": m.randn(m.batch, m.config.in_channels, *m.latent(m.config.sample_size)),
        "timestep": TIMESTEP,
        "encoder_hidden_states": m.randn(m.batch, tokens, m.config.cap_feat_dim),
        "encoder_attention_mask": m.mask(tokens, torch.bool),
    }


class Family(NamedTuple):
    """How a class's pipeline calls it: `clock`, and a maker of `arguments`.

    The timestep is float32 or int64 ``[B]``; in the weights' dtype if `like_weights`, and ``[1]`` if not `per_sample`.
    """

    clock: Clock
    arguments: Callable[[Maker], dict[str, Any]]
    like_weights: bool = False
    per_sample: bool = True


FAMILIES: dict[str, Family] = {
    "AuraFlowTransformer2DModel": Family("unit", _auraflow),
    "ChromaTransformer2DModel": Family("unit", _chroma),
    "CogVideoXTransformer3DModel": Family("index", _cogvideox),
    "CogView4Transformer2DModel": Family("thousand", _cogview4),
    "DiTTransformer2DModel": Family("index", _dit),
    "Flux2Transformer2DModel": Family("unit", _flux2),
    "FluxTransformer2DModel": Family("unit", _flux),
    "HunyuanDiT2DModel": Family("thousand", _hunyuan_dit, like_weights=True),
    "HunyuanVideoTransformer3DModel": Family("thousand", _hunyuan_video),
    "LTXVideoTransformer3DModel": Family("thousand", _ltx),
    "Lumina2Transformer2DModel": Family("unit", _lumina2),
    "MochiTransformer3DModel": Family("thousand", _mochi),
    "PixArtTransformer2DModel": Family("index", _pixart),
    "QwenImageTransformer2DModel": Family("unit", _qwen),
    "SD3Transformer2DModel": Family("thousand", _sd3),
    "SanaTransformer2DModel": Family("thousand", _sana),
    "StableAudioDiTModel": Family("unit", _stable_audio, per_sample=False),
    "WanTransformer3DModel": Family("thousand", _wan),
    "ZImageTransformer2DModel": Family("unit", _z_image),
}
