"""Reads `families.npz`: the low-memory families on the Bowl, in the form of `official_main.npz`.

Implementations: Koronos/K-Optimizers e6a496f (kaon 0.7.4), KempnerInstitute/KempnerForge 5666d0d, torch 2.13.0's
Adafactor and prodigyopt 1.1.2. Every tensor went through the named method; fp32, torch 2.13.0 on a CPU.
"""

import json
from pathlib import Path

import numpy as np

from tests.data.bowl import SHAPES
from tests.data.official import Case, Kind

FILE = Path(__file__).with_name("families.npz")


class FamilyCase(Case):
    """A `Case` out of this file."""

    def __init__(self, name: str) -> None:
        with np.load(FILE) as stored:
            self.meta = json.loads(str(stored["__meta__"]))["cases"][name]
            self._traces = {key: stored[key].astype(np.float64) for key in stored.files if key.startswith(name + "/")}
            self._start = {key: stored[f"start/0/y/{key}"].astype(np.float64) for key in SHAPES}
        self.name = name
        self.kinds: tuple[Kind, ...] = ("y", "x") if f"{name}/1/x/tall" in self._traces else ("y",)

    def bound(self, update: int, kind: Kind, name: str) -> float:
        """README.md's. KempnerForge multiplies weights by ``1 - lr decay`` in fp32, whose own rounding, 2^-25 of each
        weight and the same at every update, is 2e-5 of what an update of lr 1e-4 moves."""
        norm, displacement = self._traces[f"{self.name}/{update}/{kind}/{name}"][256:]
        decayed = "kempner" in self.name and self.meta["constructor"].get("weight_decay", 0)
        return super().bound(update, kind, name) + float(bool(decayed) * update * 2**-25 * norm / displacement)

    def d(self, update: int) -> float:
        """Prodigy's estimate after this update."""
        return float(self.meta["steps"][str(update)]["d"])
