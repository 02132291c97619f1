"""Reads `official_step_sizes.npz`: what official implementations with step sizes of their own did on the Bowl.

Keys, bound and the convention that update u uses `noise(u - 1)` are those of `official_main.npz` (README.md in this
folder); all fp32, torch 2.13.0 on a CPU, every tensor. `meta["steps"]` has, beside floors and losses, `polyak_lr`,
`ip_term` and `grad_l1` of ScheduleFree+ and `d` of Prodigy, after each stored update.

    sf_plus_paper            facebookresearch/schedule_free 70785b5, AdamCScheduleFreePlusPaper; f = the noisy loss at y
    sf_plus_paper_opts       the same with weight_decay 20, r 2, c_warmup 10, sf_beta1_anneal_steps 60
    prodigy_safeguard_bias   konstmish/prodigy 3efb213 = PyPI prodigyopt 1.1.2, safeguard_warmup and use_bias_correction
    prodigy_beta1_0          the same package, betas (0, 0.999)
"""

import json
from pathlib import Path

import numpy as np

from tests.data.bowl import SHAPES
from tests.data.official import Case

FILE = Path(__file__).with_name("official_step_sizes.npz")
CASES = ("sf_plus_paper", "sf_plus_paper_opts", "prodigy_safeguard_bias", "prodigy_beta1_0")


class StepSizeCase(Case):
    """A `Case` of this file."""

    def __init__(self, name: str) -> None:
        with np.load(FILE) as stored:
            self.meta = json.loads(str(stored["__meta__"]))["cases"][name]
            self._traces = {key: stored[key].astype(np.float64) for key in stored.files if key.startswith(name + "/")}
            self._start = {key: stored[f"start/0/y/{key}"].astype(np.float64) for key in SHAPES}
        self.name = name
        self.kinds = ("y", "x") if f"{name}/1/x/tall" in self._traces else ("y",)

    def told(self, update: int, what: str) -> float:
        """A number that the implementation itself gave after this update."""
        return float(self.meta["steps"][str(update)][what])
