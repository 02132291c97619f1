"""The numbers of the last step, read out of the flat state."""

from __future__ import annotations

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
