"""The diffusion transformer of Peebles and Xie (arXiv:2212.09748): patchify, adaLN-zero blocks, label dropout.

Differences from the paper: the model predicts one field (a velocity) and no variance, and `t` lies in [0, 1] and is
multiplied inside by `time_scale` so that the sinusoids see the paper's 0..1000.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_position_embedding(dim: int, side: int) -> Tensor:
    """Fixed sine-cosine embedding of a `side` x `side` grid, ``[side * side, dim]`` float32; `dim` a multiple of 4."""
    if dim % 4:
        raise ValueError(f"hidden_size={dim} is not a multiple of 4, which a 2-D sine-cosine embedding needs.")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None, :].expand(side, side, -1)
    columns = axis[None, :, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).float()


class TimestepEmbedder(nn.Module):
    """A time ``[B]`` -> sinusoids -> two-layer MLP -> ``[B, hidden_size]``."""

    def __init__(self, hidden_size: int, frequency_size: int = 256, time_scale: float = 1000.0) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.time_scale = time_scale
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        frequencies = torch.exp(-math.log(10000.0) * exponents)
        angles = (t.float() * self.time_scale)[:, None] * frequencies[None, :]
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding: Tensor = self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))
        return embedding


class LabelEmbedder(nn.Module):
    """Class labels int64 ``[B]`` -> ``[B, hidden_size]``.

    In training a label becomes the null class, index `num_classes`, with probability `dropout_prob`, drawn on the
    device; guidance asks for the null class by that index.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        embedding: Tensor = self.embedding_table(labels)
        return embedding


class Attention(nn.Module):
    """Multi-head self-attention over ``[B, N, D]``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} does not divide into num_heads={num_heads} heads.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``[B, N, D]`` scaled and shifted by ``[B, D]``."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


class DiTBlock(nn.Module):
    """Attention and MLP, each between a modulated LayerNorm and a gate; adaLN-zero starts it as the identity."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, hidden_size)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None, :] * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None, :] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then a linear map of each token to its patch: ``[B, N, D]`` -> ``[B, N, p * p * C]``."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return out


class DiT(nn.Module):
    """``forward(x [B, C, H, W], t [B] in [0, 1], y [B] int64) -> [B, C, H, W]``; H = W = `input_size`.

    ``num_classes=None`` builds the model conditioned on time alone: ``forward(x, t)``.
    """

    def __init__(
        self,
        input_size: int = 8,
        patch_size: int = 2,
        in_channels: int = 1,
        hidden_size: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 10,
        class_dropout_prob: float = 0.1,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size={input_size} does not divide into patches of {patch_size}.")
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        side = input_size // patch_size
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size, time_scale=time_scale)
        self.y_embedder = None if num_classes is None else LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, side)[None], persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linear maps, N(0, 0.02) for embedders, zero for modulation and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.weight.view(self.x_embedder.weight.shape[0], -1))
        if self.x_embedder.bias is not None:
            nn.init.zeros_(self.x_embedder.bias)
        for name, parameter in self.named_parameters():
            if name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def unpatchify(self, x: Tensor) -> Tensor:
        """``[B, side * side, p * p * C]`` -> ``[B, C, side * p, side * p]``."""
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.reshape(x.shape[0], side, side, p, p, self.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.in_channels, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            if y is None:
                raise ValueError(f"This DiT is conditioned on {self.num_classes} classes: pass y, int64 [B].")
            c = c + self.y_embedder(y)
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def dit_s_2(input_size: int = 32, in_channels: int = 4, num_classes: int | None = 1000) -> DiT:
    """DiT-S/2 over latents ``[B, 4, 32, 32]``: 12 blocks of width 384."""
    return DiT(input_size, 2, in_channels, hidden_size=384, depth=12, num_heads=6, num_classes=num_classes)


def dit_b_2(input_size: int = 32, in_channels: int = 4, num_classes: int | None = 1000) -> DiT:
    """DiT-B/2 over latents ``[B, 4, 32, 32]``: 12 blocks of width 768."""
    return DiT(input_size, 2, in_channels, hidden_size=768, depth=12, num_heads=12, num_classes=num_classes)


def dit_xl_2(input_size: int = 32, in_channels: int = 4, num_classes: int | None = 1000) -> DiT:
    """DiT-XL/2 over latents ``[B, 4, 32, 32]``: 28 blocks of width 1152."""
    return DiT(input_size, 2, in_channels, hidden_size=1152, depth=28, num_heads=16, num_classes=num_classes)
