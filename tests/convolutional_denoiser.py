"""A denoiser in which sizes enter as numbers, as positions, in a pooling and in a resize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolutional(nn.Module):
    """Sizes enter as numbers, as positions, in a pooling and in a resize; text of any length is attended to."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.norm, self.scale, self.text = nn.GroupNorm(2, 8), nn.Linear(1, 8), nn.Linear(6, 8)
        self.act, self.branch = nn.SiLU(), branch

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        scale = self.scale(t[:, None])
        h = self.act(self.norm(self.down(x))) * (1 + scale[:, :, None, None])
        b, c, rows, columns = h.shape
        position = torch.arange(rows * columns, dtype=h.dtype, device=h.device) / (rows * columns)
        q, k = h.flatten(2).transpose(1, 2) + position[:, None], self.text(text)
        h = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(b, c, rows, columns)
        if self.branch and rows > 4:
            h = h * 2
        out: Tensor = self.up(F.interpolate(h, size=x.shape[2:], mode="bilinear"))
        return out


def noise(batch: int, rows: int, columns: int, text: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, rows, columns), torch.full((batch,), 0.5), torch.randn(batch, text, 6)
