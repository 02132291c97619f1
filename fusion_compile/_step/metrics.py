"""The numbers of the last step, read out of the flat state."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fusion_compile import _compat
from fusion_compile._state import keys
from fusion_compile._step.update import UpdatePlan
from fusion_compile._types import Tensors


def step_metrics(plan: UpdatePlan, state: Tensors) -> Tensors:
    """Copies of all hyperparameters, the optimizer's diagnostics, the step's metrics and its counts, by name.

    Of one name a later source wins, in this order.
    """
    numbers = plan.hyperparameters.by_name(state[keys.HYPERPARAMETERS].clone())
    own = {**keys.section(state, keys.METRICS), **keys.section(state, keys.COUNTS)}
    return {**numbers, **plan.diagnostics(state), **{name: t.clone() for name, t in own.items()}}


def keep_metrics(
    update: UpdatePlan, state: Tensors, of_the_loss: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Make room in `state` for the metrics that the loss returns. Raises ValueError for a name that the step has."""
    taken = step_metrics(update, state)
    for name in of_the_loss:
        if name in taken:
            raise ValueError(
                f"the metric name {name!r} is taken by the step itself; give the loss's metric another one."
            )
    for name, (shape, dtype) in of_the_loss.items():
        state[keys.metrics(name)] = torch.zeros(shape, dtype=dtype, device=update.layout.device)
    for key, tensor in state.items():
        if keys.split(key)[0] == keys.METRICS:
            _compat.mark_static(tensor)
