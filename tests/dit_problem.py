"""A 2-block diffusion transformer on random images: shared start, shared data, and its gradient in float64.

All noise, times and labels come from a seeded generator outside the step, as the batch; label dropout is off. adaLN and
the output start at random values, not at zero, so that every parameter has a gradient from the first step. The key's
bias alone has none, ever (softmax ignores it), and where it is left in, Adam turns its rounding noise into steps of
size lr; `ridge` adds ridge/2·‖w‖² to the loss so that there, too, the gradient is a number and not noise.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from dit import DiT
from torch import Tensor, nn

from tests.oracles.protocol import Given, Tensors, float64_copies

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def small_dit(depth: int = 2, seed: int = 0) -> DiT:
    """Width 128, the least that has spectral matrices; every tensor random."""
    model = DiT(input_size=8, hidden_size=128, depth=depth, num_heads=4, mlp_ratio=2.0, class_dropout_prob=0.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            std = 0.5 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return model


@lru_cache(maxsize=64)
def batch(update: int, size: int = 8) -> Batch:
    """(image, noise, time, label) of update 1, 2, ...; fp32."""
    generator = torch.Generator().manual_seed(1000 + update)
    labels = torch.randint(0, 10, (size,), generator=generator)
    prototypes = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    image = prototypes[labels] + 0.1 * torch.randn(size, 1, 8, 8, generator=generator)
    return image, torch.randn(size, 1, 8, 8, generator=generator), torch.rand(size, generator=generator), labels


def loss_fn(model: nn.Module, x: Tensor, e: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Rectified flow: the mean squared error of the predicted velocity e - x."""
    s = t[:, None, None, None]
    return F.mse_loss(model((1 - s) * x + s * e, t, y), e - x)


def ridge_loss_fn(model: nn.Module, x: Tensor, e: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """`loss_fn` and a small ridge."""
    total = loss_fn(model, x, e, t, y)
    for p in model.parameters():
        total = total + 0.5e-2 * p.square().sum()
    return total


class DiTGradient:
    """The gradient of the small DiT's loss in float64, at any float64 point; `start` are the initial weights."""

    def __init__(self, depth: int = 2) -> None:
        self._model = small_dit(depth).double()
        self.start = float64_copies(dict(self._model.named_parameters()))

    def __call__(self, point: Given, update: int) -> Tensors:
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.copy_(torch.as_tensor(point[name]))
        x, e, t, y = batch(update)
        loss = ridge_loss_fn(self._model, x.double(), e.double(), t.double(), y)
        names, leaves = zip(*self._model.named_parameters(), strict=True)
        return float64_copies(dict(zip(names, torch.autograd.grad(loss, leaves), strict=True)))
