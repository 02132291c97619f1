"""The options of a sampler, checked when they are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from fusion_compile._program.lower import resolve_mode
from fusion_compile._sampler.conditioning import Conditioning, Exact, Rank, refuse_unknown
from fusion_compile._sampler.rank.timestep_range import TimestepRange, range_to_fit
from fusion_compile._sampler.schedule import count_steps
from fusion_compile._sampler.table.trajectory_watch import Verify


@dataclass(frozen=True, eq=False)
class SamplerOptions:
    """The arguments of `optimize_sampler` beside the model.

    `schedule`: ``[n_steps]`` on the CPU if it was fixed, else None. `roles`: argument -> role, as given.
    Raises ValueError or TypeError for the first option that cannot be served.
    """

    n_steps: int
    schedule: Tensor | None = None
    conditioning: Conditioning = field(default_factory=Exact)
    roles: Mapping[str, str] | None = None
    mode: str | None = None
    backend: str = "inductor"
    byte_budget: int | None = None
    verify: Verify = "trajectory"
    method: str = "forward"

    def __post_init__(self) -> None:
        count_steps(self.n_steps, self.schedule)
        refuse_unknown(self.conditioning)
        if self.verify not in get_args(Verify):
            raise ValueError(f"verify={self.verify!r}; use 'trajectory', 'always' or 'never'.")
        if not isinstance(self.backend, str):
            raise TypeError(f"backend={self.backend!r} is not a name; give a torch.compile backend's, 'inductor'.")
        if self.roles is not None and not isinstance(self.roles, Mapping):
            raise TypeError(f"roles={self.roles!r}; give a dictionary from argument names to roles, {{'t': 'step'}}.")
        budget = self.byte_budget
        if budget is not None and (not isinstance(budget, int | float) or isinstance(budget, bool) or not budget >= 0):
            raise ValueError(f"byte_budget={budget!r} is not a number of bytes; give 2**30 for example, or None.")
        resolve_mode(self.mode, torch.device("cpu"))
        _ = self.fitted_range

    @property
    def fitted_range(self) -> TimestepRange | None:
        """The timesteps that rank conditioning is fitted to; None with a table."""
        return range_to_fit(self.conditioning, self.schedule) if isinstance(self.conditioning, Rank) else None
