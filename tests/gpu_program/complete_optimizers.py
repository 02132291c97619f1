"""Every complete optimizer of the package beside `RECIPES`, codecs of stored state, and a model that they all take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile import optim
from fusion_compile.optim import Transform


class Mixed(nn.Module):
    """Two matrix shapes, an embedding, a normalization and biases: banks of every kind, in as few kernels as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(10, 128)
        self.wide = nn.Linear(128, 256)
        self.norm = nn.LayerNorm(256)
        self.out = nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.out(self.norm(F.silu(self.wide(x + self.label(y)))))
        return found


def mixed(dtype: torch.dtype = torch.float32) -> Mixed:
    torch.manual_seed(0)
    return Mixed().to(dtype)


def mixed_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 128, generator=generator), torch.arange(8)


def ridge_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A small ridge beside the error, so that no gradient is rounding noise alone."""
    loss = (model(x.to(next(model.parameters()).dtype), y).float() - x).square().mean()
    for p in model.parameters():
        loss = loss + 0.5e-2 * p.float().square().sum()
    return loss


def of_products(dtype: torch.dtype | None) -> dict[str, Any]:
    return {} if dtype is None else {"matmul_dtype": dtype}


Made = Callable[[torch.dtype | None], Transform]
"""From the dtype of Newton-Schulz's products, None for the recipe's own."""

FURTHER: dict[str, Made] = {
    "adakaon": lambda dtype: optim.adakaon(),
    "nekaon": lambda dtype: optim.nekaon(),
    "adapnm": lambda dtype: optim.adapnm(),
    "adamuon": lambda dtype: optim.adamuon(**of_products(dtype)),
    "adamuon_sign": lambda dtype: optim.adamuon_sign(**of_products(dtype)),
    "adafactor": lambda dtype: optim.adafactor(),
    "prodigy": lambda dtype: optim.prodigy(slice_p=11),
    "mechanic of adamw": lambda dtype: optim.mechanic(optim.adamw(1.0)),
    "kempner_muon": lambda dtype: optim.kempner_muon(**of_products(dtype)),
    "kempner_sf_adamw": lambda dtype: optim.kempner_sf_adamw(),
    "adamw, bf16, int8": lambda dtype: optim.adamw(momentum="bf16", second_moment="int8"),
    "lion, 4bit": lambda dtype: optim.lion(momentum="4bit"),
    "normuon, int8": lambda dtype: optim.normuon(momentum="int8", second_moment="bf16", **of_products(dtype)),
}
