"""The real digits, the classifier that judges generated ones, and the pictures of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

SIDE = 8
NEIGHBOURS = 3
WRONG = "#e5484d"


def real_digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 scanned digits: images float32 ``[N, 1, 8, 8]`` in [-1, 1] and labels int64 ``[N]``."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    return images, torch.tensor(digits.target, dtype=torch.int64, device=device)


def read_digits(images: Tensor) -> NDArray[np.int64]:
    """What a nearest-neighbour classifier fitted on the real digits sees in `images` ``[N, 1, 8, 8]``."""
    real, labels = real_digits(torch.device("cpu"))
    judge = KNeighborsClassifier(NEIGHBOURS).fit(real.flatten(1).numpy(), labels.numpy())
    seen: NDArray[np.int64] = judge.predict(images.clamp(-1, 1).flatten(1).cpu().numpy())
    return seen


def draw_samples(images: Tensor, asked: NDArray[np.int64], seen: NDArray[np.int64], title: str, path: Path) -> None:
    """One row a digit asked for; a frame around each image in which the classifier sees another digit."""
    rows = sorted(set(asked.tolist()))
    columns = max(int((asked == digit).sum()) for digit in rows)
    cell = SIDE + 2  # one pixel of margin on each side
    sheet = np.ones((len(rows) * cell, columns * cell), dtype=np.float32)
    inch = 0.38
    figure, axes = plt.subplots(figsize=(columns * inch, len(rows) * inch))
    ink = (1 - images.clamp(-1, 1)[:, 0].cpu().numpy()) / 2  # dark on white, as on paper
    for row, digit in enumerate(rows):
        for column, i in enumerate(np.flatnonzero(asked == digit)):
            top, left = row * cell + 1, column * cell + 1
            sheet[top : top + SIDE, left : left + SIDE] = ink[i]
            if seen[i] != digit:
                corner = (left - 1, top - 1)
                axes.add_patch(Rectangle(corner, SIDE + 1, SIDE + 1, fill=False, edgecolor=WRONG, linewidth=1.5))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([row * cell + (cell - 1) / 2 for row in range(len(rows))], [str(digit) for digit in rows])
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=12)
    axes.set_ylabel("digit asked for")
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def draw_loss(losses: Sequence[float], title: str, path: Path) -> None:
    """The loss of every step, and the mean of those around it."""
    steps, window = np.arange(1, len(losses) + 1), max(1, min(50, len(losses) // 10))
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(steps, losses, color="#9dbbe3", linewidth=0.6, label="each step")
    axes.plot(steps[window // 2 :][: len(mean)], mean, color="#1f4e9c", linewidth=1.8, label=f"mean of {window} steps")
    axes.set_yscale("log")
    ticks = [tick for tick in (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3) if min(losses) <= tick <= max(losses)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0, len(losses))
    axes.set_xlabel("step")
    axes.set_ylabel("rectified-flow loss")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
