"""The timesteps of a trajectory, as they are given and as the model is given them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_schedule(timesteps: Tensor | Sequence[float]) -> Tensor:
    """`timesteps` as ``[n]`` on the CPU.

    Raises TypeError for what is not made of numbers, ValueError for another number of dimensions, no entries or nan.
    """
    try:
        schedule = torch.as_tensor(timesteps).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"timesteps={timesteps!r}; pass a tensor [n] or a list of numbers, one value for each step."
        ) from None
    if schedule.dim() != 1 or not len(schedule):
        raise ValueError(f"timesteps has shape {list(schedule.shape)}; a schedule is one value for each step, [n].")
    if schedule.is_floating_point() and not bool(torch.isfinite(schedule).all()):
        raise ValueError(f"timesteps={schedule.tolist()} holds a value that is not finite; give numbers.")
    return schedule


def count_steps(n_steps: int | None, schedule: Tensor | None) -> int:
    """The steps of a trajectory: `n_steps`, or the length of `schedule` ``[n]``.

    Raises ValueError if neither is given, if they disagree, and for less than one step, TypeError for another kind.
    """
    if n_steps is None:
        if schedule is None:
            raise ValueError("neither n_steps nor timesteps is given; pass n_steps=40, say, or timesteps=.")
        return len(schedule)
    if not isinstance(n_steps, int) or isinstance(n_steps, bool):
        raise TypeError(f"n_steps={n_steps!r}; pass a whole number of steps, and a schedule as timesteps=.")
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}; a schedule has at least one step.")
    if schedule is not None and len(schedule) != n_steps:
        raise ValueError(
            f"timesteps has shape {list(schedule.shape)}; n_steps={n_steps} needs [{n_steps}]. Leave n_steps out, or "
            f"pass a schedule of that length."
        )
    return n_steps


def preset(n_steps: int) -> Tensor:
    """The schedule of `Sampler.sample` where none was given: ``linspace(1, 0, n_steps + 1)[:-1]``."""
    return torch.linspace(1, 0, n_steps + 1)[:-1]


def cast_schedule(schedule: Tensor, t: Tensor) -> Tensor:
    """`schedule` ``[n]`` on the CPU in the dtype of `t`; raises ValueError if an integer dtype cannot hold it."""
    cast = schedule.to(t.dtype)
    if not t.is_floating_point() and not torch.equal(cast.to(schedule.dtype), schedule):
        raise ValueError(
            f"the timestep is {t.dtype} and the schedule {schedule[:3].tolist()}… holds fractions; pass timesteps= "
            f"with the integers that the scheduler gives to the model."
        )
    return cast
