"""`optimize_sampler`: a diffusion model whose time conditioning is a table.

The model is exported and split by when its values become known: a table computed once per schedule, a prologue run once
per request for all steps, and a body that takes the latent and reads one row. ``docs/sampler.md`` tells it whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._lower import resolve_mode
from fusion_compile._sampler_module import Sampler as Sampler


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
) -> Sampler:
    """A drop-in for `model` in a sampling loop of `n_steps` steps.

    `model`: in eval mode; nothing is asked of its attribute or argument names. `timesteps`: what the model will be
    given as its timestep, ``[n_steps]``; default ``linspace(1, 0, n_steps + 1)[:-1]``. `example_inputs`: arguments of
    one call; with them the work is done now, without them at the first call. `roles`: argument name -> "step",
    "request" or "live"; what is left out is guessed. `exact`: compute rows one step at a time, which is bitwise what
    the model computes in ``mode="eager"``; otherwise all steps in one batch, with the measured difference in the
    report. `mode`, `backend`: as for `compile_training_step`. `byte_budget`: of the table, see
    `hoist_time_conditioning`.

    Raises ValueError for a model in training mode, a schedule of another length, an unknown role, argument or mode.
    """
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode, so dropout would be frozen into the table; call model.eval()."
        )
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}; a schedule has at least one step.")
    if timesteps is None:
        timesteps = torch.linspace(1, 0, n_steps + 1)[:-1]
    schedule = torch.as_tensor(timesteps).detach().cpu()
    if schedule.shape != (n_steps,):
        raise ValueError(f"timesteps has shape {list(schedule.shape)}; n_steps={n_steps} needs [{n_steps}].")
    resolve_mode(mode, torch.device("cpu"))
    options = {"exact": exact, "mode": mode, "backend": backend, "byte_budget": byte_budget}
    sampler = Sampler(model, schedule, roles, options)
    if example_inputs is not None:
        sampler.prepare(*example_inputs)
    return sampler
