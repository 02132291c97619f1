"""Reads `official_kronecker.npz`: KL-Shampoo, KL-SOAP and SOAP on the Bowl, in the form of `official_main.npz`.

Implementations: yorkerlin/KL-Methods a02e622 `KLOpt` (cast_dtype fp32; defaults, and lr 3e-3 with and without
using_klsoap) on tall, wide and square with `AdamW(lr 1e-3, betas (.9, .95), no decay)` on the rest; nikhilvyas/SOAP
a1e5535 `SOAP` (lr 3e-3, betas (.95, .95), weight_decay .01) on everything. torch 2.13.0 on a CPU.

SOAP and KL-SOAP rotate the gradient into the eigenbasis of the first G Gᵀ. On tall, wide and table that matrix is
singular and the basis of its null space is arbitrary, so that the floors there are 0.1 to 0.5: only square and the loss
can be compared. KL-Shampoo treats all first eigenvalues alike and has no such freedom.
"""

import json
from pathlib import Path

import numpy as np

from tests.data.bowl import SHAPES
from tests.data.official import Case, Kind

FILE = Path(__file__).with_name("official_kronecker.npz")
CASES = ("kl_shampoo_fp32", "kl_shampoo_fp32_lr", "kl_soap_fp32_lr", "soap_official")


class KroneckerCase(Case):
    """A `Case` out of this file."""

    def __init__(self, name: str) -> None:
        with np.load(FILE) as stored:
            self.meta = json.loads(str(stored["__meta__"]))["cases"][name]
            self._traces = {key: stored[key].astype(np.float64) for key in stored.files if key.startswith(name + "/")}
            self._start = {key: stored[f"start/0/y/{key}"].astype(np.float64) for key in SHAPES}
        self.name, self.kinds = name, ("y",)

    def bound(self, update: int, kind: Kind, name: str) -> float:
        """README.md's, and √updates 2^-24 ‖weights‖ / ‖displacement‖: every update rounds the weights to fp32, which is
        6e-4 of what the first step of lr 1e-4 moves (2e-5 at lr 3e-3)."""
        norm, displacement = self._traces[f"{self.name}/{update}/{kind}/{name}"][256:]
        return super().bound(update, kind, name) + float(2**-24 * update**0.5 * norm / displacement)

    def clean_loss(self, update: int) -> float:
        """The loss without noise at the weights after this update."""
        return float(self.meta["steps"][str(update)]["clean_loss_y"])
