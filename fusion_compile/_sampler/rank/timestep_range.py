"""A range of timesteps, and the timesteps in it at which a fit is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile._sampler.conditioning import Rank


@dataclass(frozen=True)
class TimestepRange:
    """Timesteps from `low` to `high`, both included, in the units of the model's argument."""

    low: float
    high: float

    def in_dtype_of(self, like: Tensor) -> TimestepRange:
        """The range that holds every value of this one after a cast to the dtype of `like`."""
        low, high = torch.tensor([self.low, self.high], dtype=torch.float64).to(like.dtype).tolist()
        return TimestepRange(min(low, self.low), max(high, self.high))

    def samples(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`n` evenly spaced timesteps and the timesteps halfway between them, in the dtype and on the device of `like`.

        There are fewer where the dtype has fewer values. A timestep halfway is never one of the first; where nothing
        lies between, both tensors are the same.
        """
        grid = torch.linspace(self.low, self.high, n, dtype=torch.float64)
        halfway = (grid[1:] + grid[:-1]) / 2
        if not like.is_floating_point():
            grid, halfway = grid.round(), halfway.round()
        sampled, between = (torch.unique(t.to(like.dtype)) for t in (grid, halfway))
        between = between[~torch.isin(between.double(), sampled.double())]
        return sampled.to(like.device), (between if len(between) else sampled).to(like.device)


def range_to_fit(asked: Rank, schedule: Tensor | None) -> TimestepRange:
    """The range that `asked` names, or the range of `schedule` ``[n]``.

    Raises ValueError if there is neither, and for a schedule of one value.
    """
    if asked.range is not None:
        values = [*asked.range]
    elif schedule is not None:
        values = schedule.double().tolist()
    else:
        raise ValueError(
            f"Rank({asked.rank}) is fitted to a range of timesteps and none is known; pass Rank({asked.rank}, (0, 1)), "
            f"(0, 999) or what the model is given, or timesteps=."
        )
    low, high = float(min(values)), float(max(values))
    if not low < high:
        raise ValueError(
            f"the range of timesteps is [{low:g}, {high:g}]; pass Rank({asked.rank}, (first, last)) with two values."
        )
    return TimestepRange(low, high)
