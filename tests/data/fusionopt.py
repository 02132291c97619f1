"""Reads `fusionopt.npz`: what FusionOpt itself did on the Bowl with eight sets of components.

    from tests.data.fusionopt import CASES, Case
    case = Case("ns5")
    case.errors(20, "y", trace(weights, start))     # {name: error}: all must be <= case.bound(20, "y", name)

lr 1e-3, spectral decay 0.01, otherwise its defaults; the loss was handed over before every update. Unlike in
`official_main.npz` **update n, counted from 1, uses `noise(n)`**. Stored: traces at y (and x of the Schedule-Free
cases) after the updates of `bowl.UPDATES`; in `meta`, for every update, the loss, its clamped ratio and its multiplier.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tests.data.bowl import SHAPES, Bowl, start_of

FILE = Path(__file__).with_name("fusionopt.npz")
CASES = (
    "none",
    "ns5",
    "ns5_normuon_sf",
    "ns5_normuon_sf_bf16",
    "ns5_normuon_sf_mona_shampoo",
    "ns5_normuon_cautious",
    "hyperball_ns5_normuon",
    "ns5_normuon_sf_cosine",
)
Kind = Literal["y", "x"]

FLOOR = {"fp32": 1e-4, "bf16": 3e-2}
"""How far FusionOpt's own code moves, relative to the displacement, with other kernels and gradients off by one ulp."""


class Case:
    """One run of FusionOpt. `kwargs`: how it was constructed; `meta`: losses, ratios and multipliers by update."""

    def __init__(self, name: str) -> None:
        with np.load(FILE) as stored:
            self.meta: dict[str, Any] = json.loads(str(stored["__meta__"]))["cases"][name]
            self._traces = {key: stored[key].astype(np.float64) for key in stored.files if key.startswith(name + "/")}
        self.name, self.kwargs = name, dict(self.meta["kwargs"])
        self.kinds: tuple[Kind, ...] = ("y", "x") if self.meta["sf"] else ("y",)
        self._start = {n: p.double().flatten().numpy() for n, p in start_of(Bowl()).items()}

    def errors(self, update: int, kind: Kind, found: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
        """By name the largest of three differences, each relative to the displacement: entries, norm, its norm."""
        out = {}
        for name in SHAPES:
            official, at = self._traces[f"{self.name}/{update}/{kind}/{name}"], found[name]
            start = self._start[name][np.random.default_rng(7).integers(0, self._start[name].size, 256)]
            entries = np.linalg.norm(at[:256] - official[:256]) / np.linalg.norm(official[:256] - start)
            out[name] = float(max(entries, np.abs(at[256:] - official[256:]).max() / official[257]))
        return out

    def bound(self, update: int, kind: Kind, name: str) -> float:
        """The floor, and the rounding of fp32 weights (1e-7 of a norm near 1) where the displacement is small."""
        floor = FLOOR[self.kwargs.get("hot_dtype", "fp32")]
        return float(floor + 1e-7 / self._traces[f"{self.name}/{update}/{kind}/{name}"][257])
