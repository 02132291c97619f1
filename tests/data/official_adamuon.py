"""Reads `official_adamuon.npz`: Chongjie-Si/AdaMuon on the Bowl, with its Newton-Schulz in fp32.

Its sign makes it chaotic, so updates 1, 2 and 5 are compared. table, bias and gain had
`AdamW(lr 1e-3, betas (.9, .95))`.
"""

import json
from pathlib import Path

import numpy as np

from tests.data.bowl import SHAPES
from tests.data.official import Case

FILE = Path(__file__).with_name("official_adamuon.npz")
NAME = "adamuon_official_fp32ns"


class AdaMuonCase(Case):
    """The one `Case` of this file."""

    def __init__(self) -> None:
        with np.load(FILE) as stored:
            self.meta = json.loads(str(stored["__meta__"]))["cases"][NAME]
            self._traces = {key: stored[key].astype(np.float64) for key in stored.files if key.startswith(NAME + "/")}
            self._start = {key: stored[f"start/0/y/{key}"].astype(np.float64) for key in SHAPES}
        self.name, self.kinds = NAME, ("y",)
