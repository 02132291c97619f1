"""The problem on which every implementation of an optimizer in `official_main.npz` was run.

`Bowl` is a random quadratic over six tensors, sum(h (p - t)^2 / 2 + n p): the gradient noise n arrives as the batch, so
that the gradient, h (p - t) + n, depends on where it is taken (y of Schedule-Free) and on nothing else. Every number
comes from numpy's PCG64. `trace` reduces the weights to what is stored. Update u, counted from 1, uses `noise(u - 1)`.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (192, 128),
    "wide": (128, 160),
    "square": (128, 128),
    "table": (40, 24),
    "bias": (160,),
    "gain": (33,),
}
SPECTRAL = ("tall", "wide", "square")
SCALAR = ("table", "bias", "gain")
UPDATES = (1, 2, 5, 20, 120)  # the updates after which a trajectory is stored


class Bowl(nn.Module):
    """Parameters `tall` to `gain` (fp32), with buffers `t_<name>` (the minimum) and `h_<name>` (the curvature)."""

    tall: nn.Parameter
    wide: nn.Parameter
    square: nn.Parameter
    table: nn.Parameter
    bias: nn.Parameter
    gain: nn.Parameter

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        draw = np.random.default_rng(seed)
        self.scale = scale
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(_fp32(draw.standard_normal(shape) * 0.05)))
            self.register_buffer("t_" + name, _fp32(draw.standard_normal(shape) * 0.05))
            self.register_buffer("h_" + name, _fp32(np.exp(draw.uniform(-3, 1, shape))))

    def forward(self, *noise: Tensor) -> Tensor:
        total = torch.zeros((), device=noise[0].device)
        for name, n in zip(SHAPES, noise, strict=True):
            p, t, h = getattr(self, name), getattr(self, "t_" + name), getattr(self, "h_" + name)
            total = total + (0.5 * h * (p - t).square() + n * p).sum()
        return self.scale * total


def noise(step: int, seed: int = 1, level: float = 0.02) -> tuple[Tensor, ...]:
    """The batch of one update: one fp32 tensor for each parameter, in the order of SHAPES."""
    draw = np.random.default_rng([seed, step])
    return tuple(_fp32(draw.standard_normal(shape) * level) for shape in SHAPES.values())


def loss_fn(model: nn.Module, *batch: Tensor) -> Tensor:
    """The loss in the form that `compile_training_step` takes."""
    loss: Tensor = model(*batch)
    return loss


def start_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights by name, to measure displacements from."""
    return {name: getattr(model, name).detach().clone() for name in SHAPES}


def trace(
    weights: Mapping[str, Tensor | npt.NDArray[np.float64]], start: Mapping[str, Tensor | npt.NDArray[np.float64]]
) -> dict[str, npt.NDArray[np.float64]]:
    """{name: 258 numbers}: 256 entries at fixed places, the norm, and the norm of the displacement from `start`."""
    out = {}
    for name, shape in SHAPES.items():
        w, s = (np.asarray(source[name], dtype=np.float64).ravel() for source in (weights, start))
        at = np.random.default_rng(7).integers(0, int(np.prod(shape)), 256)
        out[name] = np.concatenate([w[at], [np.linalg.norm(w), np.linalg.norm(w - s)]])
    return out


def _fp32(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
