"""Reads `official_main.npz`, and says how far from an official trajectory one may be (README.md in this folder).

    from tests.data.official import Case
    case = Case("torch_muon_original_fp32ns")
    case.ratios(20, "y", trace(weights, start))     # {name: error / bound}: all must be <= 1

Errors are relative to the displacement from the start, not to the weights: an optimizer is judged by what it moved.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.data.bowl import SHAPES

FILE = Path(__file__).with_name("official_main.npz")
CASES = (
    "torch_muon_original_fp32ns",
    "muon_kellerjordan_fp32ns",
    "normuon_official_fp32ns",
    "po_normuon_match_rms_fp32ns",
    "sf_adamw",
    "sf_wrapper_muon_nowd_fp32ns",
)
Kind = Literal["y", "x"]  # y: where the gradient is taken; x: the average of the Schedule-Free cases


class Case:
    """One official implementation on the Bowl. `meta` holds its source, version and constructor arguments."""

    def __init__(self, name: str) -> None:
        with np.load(FILE) as stored:
            cases = json.loads(str(stored["__meta__"]))["cases"]
            if name not in cases:
                raise KeyError(f"no official trajectory {name!r}; there are: {', '.join(sorted(cases))}")
            self.meta = cases[name]
            self._traces = {key: stored[key].astype(np.float64) for key in stored.files if key.startswith(name + "/")}
            self._start = {key: stored[f"start/0/y/{key}"].astype(np.float64) for key in SHAPES}
        self.name = name
        self.kinds: tuple[Kind, ...] = ("y", "x") if f"{name}/1/x/tall" in self._traces else ("y",)

    def error(self, update: int, kind: Kind, name: str, found: npt.NDArray[np.float64]) -> float:
        """The largest of three differences, each relative to the displacement: entries, norm, displacement's norm."""
        official, start = self._traces[f"{self.name}/{update}/{kind}/{name}"], self._start[name]
        entries = np.linalg.norm(found[:256] - official[:256]) / np.linalg.norm(official[:256] - start[:256])
        norms = np.abs(found[256:] - official[256:]).max() / official[257]
        return float(max(entries, norms))

    def bound(self, update: int, kind: Kind, name: str) -> float:
        """3 floor + 2e-5 + 1e-7 / ||displacement||: what other kernels and one-ulp gradients change, three times."""
        floor = self.meta["steps"][str(update)][f"floor_{kind}"][name]
        displacement = self._traces[f"{self.name}/{update}/{kind}/{name}"][257]
        return float(3 * floor + 2e-5 + 1e-7 / displacement)

    def ratios(self, update: int, kind: Kind, found: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
        """{name: error / bound} for the traces `found` (of `bowl.trace`) after this update."""
        return {n: self.error(update, kind, n, found[n]) / self.bound(update, kind, n) for n in SHAPES}
