"""Reads `official_adapnm.npz`: zeke-xie/Positive-Negative-Momentum's AdaPNM on the Bowl, all six tensors, lr 1e-3, its
defaults (betas .9, .999 and 1, eps 1e-8, AMSGrad)."""

import json
from pathlib import Path

import numpy as np

from tests.data.bowl import SHAPES
from tests.data.official import Case

FILE = Path(__file__).with_name("official_adapnm.npz")
NAME = "adapnm_official"


class AdaPNMCase(Case):
    """The one `Case` of this file."""

    def __init__(self) -> None:
        with np.load(FILE) as stored:
            self.meta = json.loads(str(stored["__meta__"]))["cases"][NAME]
            self._traces = {key: stored[key].astype(np.float64) for key in stored.files if key.startswith(NAME + "/")}
            self._start = {key: stored[f"start/0/y/{key}"].astype(np.float64) for key in SHAPES}
        self.name, self.kinds = NAME, ("y",)
