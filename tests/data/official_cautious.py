"""Reads `official_cautious.npz`: C-AdamW and C-Lion of kyleliang919/C-Optim (commit 2c0517c), run on the whole Bowl.

Keys, updates, noise and the bound are those of `official_main.npz` (README.md in this folder). `c_adamw_loop`: lr 1e-3,
betas (.9, .999), eps 1e-6, its path without foreach, which adds eps to √v before the bias correction. `c_lion`: lr
1e-4, betas (.95, .98), mask times n / (k + 1).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.data.bowl import SHAPES

FILE = Path(__file__).with_name("official_cautious.npz")
CASES = ("c_adamw_loop", "c_lion")


class Case:
    """One official implementation on the Bowl. `meta` holds its source, commit and constructor arguments."""

    def __init__(self, name: str) -> None:
        with np.load(FILE) as stored:
            self.meta = json.loads(str(stored["__meta__"]))["cases"][name]
            self._traces = {key: stored[key].astype(np.float64) for key in stored.files if key.startswith(name + "/")}
            self._start = {key: stored[f"start/0/y/{key}"].astype(np.float64) for key in SHAPES}
        self.name = name

    def error(self, update: int, name: str, found: npt.NDArray[np.float64]) -> float:
        """The largest of three differences, each relative to the displacement: entries, norm, displacement's norm."""
        official, start = self._traces[f"{self.name}/{update}/y/{name}"], self._start[name]
        entries = np.linalg.norm(found[:256] - official[:256]) / np.linalg.norm(official[:256] - start[:256])
        norms = np.abs(found[256:] - official[256:]).max() / official[257]
        return float(max(entries, norms))

    def bound(self, update: int, name: str) -> float:
        """3 floor + 2e-5 + 1e-7 / ||displacement||: what other kernels and one-ulp gradients change, three times."""
        floor = self.meta["steps"][str(update)]["floor_y"][name]
        displacement = self._traces[f"{self.name}/{update}/y/{name}"][257]
        return float(3 * floor + 2e-5 + 1e-7 / displacement)

    def ratios(self, update: int, found: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
        """{name: error / bound} for the traces `found` (of `bowl.trace`) after this update."""
        return {n: self.error(update, n, found[n]) / self.bound(update, n) for n in SHAPES}
