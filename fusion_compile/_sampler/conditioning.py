"""How a sampler conditions its denoising steps: rows computed one by one, rows in a batch, or low-rank layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias


@dataclass(frozen=True)
class Exact:
    """Compute the rows of the table one timestep at a time.

    In ``mode="eager"`` every output is then bitwise the model's. Other modes compile the body, and Inductor rounds
    where it fuses.

    Example:
        >>> import fusion_compile as fc
        >>> fc.Exact()
        Exact()
    """


@dataclass(frozen=True)
class Batched:
    """Compute the rows of a whole schedule in one batch (`torch.vmap`), which is faster for each new request.

    Sums run in another order than the model's. `ProgramReport.measured_difference` states by how much the first rows
    differ from rows computed one at a time.

    Example:
        >>> import fusion_compile as fc
        >>> fc.Batched()
        Batched()
    """


@dataclass(frozen=True)
class Rank:
    """Serve every timestep of a range without a table, approximately: `factor_conditioning`.

    The linear layers that read the conditioning vector are restricted to its `rank` main directions over the range.
    `ProgramReport.rank` has the measured difference.

    Args:
        rank: Number of directions, at least 1. More directions are closer to the model and read more bytes.
        range: First and last timestep, in the units of the model's argument: ``(0, 1)``, or ``(0, 999)`` for integer
            timesteps. None takes the range of the sampler's `timesteps`.

    Raises:
        TypeError: If `rank` is no whole number or `range` no pair of numbers.
        ValueError: If `rank` is below 1, or `range` does not hold two different finite numbers.

    Example:
        >>> import fusion_compile as fc
        >>> fc.Rank(64, (0, 1))
        Rank(rank=64, range=(0, 1))
    """

    rank: int
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool):
            raise TypeError(f"Rank(rank={self.rank!r}): a number of directions is a whole number, 64 for example.")
        if self.rank < 1:
            raise ValueError(f"Rank(rank={self.rank}): a subspace has at least one dimension; pass 1 or more.")
        if self.range is None:
            return
        ends = self.range
        numbers = isinstance(ends, tuple | list) and all(
            isinstance(end, Real) and not isinstance(end, bool) for end in ends
        )
        if not numbers:
            raise TypeError(f"Rank(range={ends!r}): pass range=(first, last), two numbers, such as (0, 1) or (0, 999).")
        if len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] == ends[1]:
            raise ValueError(
                f"Rank(range={self.range}): a range has two different finite ends; pass range=(first, last), such as "
                f"(0, 1) or (0, 999)."
            )


Conditioning: TypeAlias = Exact | Batched | Rank
"""The kinds that `optimize_sampler(conditioning=…)` takes."""


def refuse_unknown(conditioning: object) -> None:
    """Raise TypeError unless `conditioning` is an `Exact`, a `Batched` or a `Rank`."""
    if not isinstance(conditioning, Exact | Batched | Rank):
        raise TypeError(f"conditioning={conditioning!r}; pass Exact(), Batched() or Rank(64, (0, 1)).")
