"""`optimize_sampler`: a diffusion model whose time conditioning is a table.

The model is exported and split by when its values become known: a table computed once per schedule, a prologue run once
per request for all steps, and a body that takes the latent and reads one row. ``docs/sampler.md`` tells it whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fusion_compile._program.lower import resolve_mode
from fusion_compile._sampler.module import Sampler as Sampler
from fusion_compile._sampler.module import as_schedule
from fusion_compile._sampler.rank.range_rows import range_to_fit
from fusion_compile._sampler.table.pass_watch import Verify
from fusion_compile._sampler.weights.unservable import refuse_unservable


def optimize_sampler(
    model: nn.Module,
    n_steps: int,
    *,
    timesteps: Tensor | Sequence[float] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    roles: Mapping[str, str] | None = None,
    exact: bool = True,
    mode: str | None = None,
    backend: str = "inductor",
    byte_budget: int | None = None,
    verify: Verify = "pass",
    rank: int | None = None,
    t_range: tuple[float, float] | None = None,
) -> Sampler:
    """A drop-in for `model` in a sampling loop of `n_steps` steps.

    `model`: in eval mode; nothing is asked of its attribute or argument names. `timesteps`: what the model will be
    given as its timestep, ``[n_steps]``, and nothing else; left out, timesteps of any dtype are learned as they come,
    and kept up to ``4 * n_steps`` of them. `example_inputs`: arguments of one call; with them the work is done now,
    without them at the first call. `roles`: argument name -> "step", "request" or "live"; what is left out is guessed.
    `exact`: compute rows one step at a time, which is bitwise what the model computes in ``mode="eager"``; otherwise
    all steps in one batch, with the measured difference in the report. `mode`, `backend`: as for
    `compile_training_step`. `byte_budget`: of the table, see `hoist_time_conditioning`. `verify`: when the hoisted
    weights are compared by a checksum, which sees what no version tells: at the start of each pass over the schedule
    ("pass"), at every call ("always") or never. `rank`: instead of a table, the layers that read the conditioning are
    restricted to so many directions of it, which serves any timestep of a range and is approximate, whatever `exact`
    says; the report has the measured difference. `t_range`: first and last timestep of that range, as the model is
    given them; left out, those of `timesteps`.

    Raises ValueError for a model in training mode, with weights that are no plain tensors or with hooks that move or
    remember (offloading, caching), a schedule of another length, an unknown role, argument, mode or
    `verify`, a rank below 1 or one without a range.
    """
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode, so dropout would be frozen into the table; call model.eval()."
        )
    refuse_unservable(model)
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}; a schedule has at least one step.")
    if verify not in get_args(Verify):
        raise ValueError(f"verify={verify!r}; use 'pass', 'always' or 'never'.")
    schedule = None if timesteps is None else as_schedule(timesteps)
    if schedule is not None and len(schedule) != n_steps:
        raise ValueError(f"timesteps has shape {list(schedule.shape)}; n_steps={n_steps} needs [{n_steps}].")
    resolve_mode(mode, torch.device("cpu"))
    covers = range_to_fit(rank, t_range, schedule)
    options: dict[str, Any] = {"exact": exact, "mode": mode, "backend": backend, "byte_budget": byte_budget}
    options |= {"rank": rank, "covers": covers}
    sampler = Sampler(model, n_steps, schedule, roles, verify, options)
    if example_inputs is not None:
        sampler.prepare(*example_inputs)
    return sampler
