"""The numbers of the last step, read out of the flat state."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from fusion_compile import _compat
from fusion_compile._state import keys
from fusion_compile._step.pure_step import METRICS
from fusion_compile._step.update import UpdatePlan, is_alike
from fusion_compile._types import Tensors


def step_metrics(plan: UpdatePlan, state: Tensors, shown: Collection[str] | None = None) -> Tensors:
    """Copies of all hyperparameters, the optimizer's diagnostics, the step's metrics and its counts, by name.

    Of one name a later source wins, in this order. `shown`: the loss's metrics that the last step has; None for all.
    """
    numbers = plan.hyperparameters.by_name(state[keys.HYPERPARAMETERS].clone())
    kept = keys.section(state, keys.METRICS)
    if shown is not None:
        kept = {name: t for name, t in kept.items() if name in METRICS or name in shown}
    own = {**kept, **keys.section(state, keys.COUNTS)}
    return {**numbers, **plan.diagnostics(state), **{name: t.clone() for name, t in own.items()}}


def keep_metrics(
    update: UpdatePlan, state: Tensors, of_the_loss: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Make room in `state` for the metrics that the loss returns. Raises ValueError for a name that the step has."""
    _refuse_taken(update, state, of_the_loss)
    for name, (shape, dtype) in of_the_loss.items():
        state[keys.metrics(name)] = torch.zeros(shape, dtype=dtype, device=update.layout.device)
    for key, tensor in state.items():
        if keys.split(key)[0] == keys.METRICS:
            _compat.mark_static(tensor)


def drop_metrics(state: Tensors) -> None:
    """Take the loss's metrics out of `state`."""
    for name in _of_the_loss(state):
        del state[keys.metrics(name)]


def fit_metrics(update: UpdatePlan, state: Tensors, new: Tensors) -> None:
    """Let `state` have the loss's metrics that the results `new` of one step have, and no others.

    Where nothing is captured a loss may return other metrics at each step (an accuracy every tenth), of another shape
    or dtype. One that it did not return is not shown. Raises ValueError for a name that the step has; nothing has
    changed then.
    """
    now, before = _of_the_loss(new), _of_the_loss(state)
    _refuse_taken(update, {k: t for k, t in state.items() if keys.split(k)[1] not in before}, now)
    for name in before - now:
        del state[keys.metrics(name)]
    for name in now:
        key = keys.metrics(name)
        if key not in state or not is_alike(state[key], new[key]):
            state[key] = torch.empty_like(new[key])


def _of_the_loss(state: Tensors) -> set[str]:
    return {*keys.section(state, keys.METRICS)} - {*METRICS}


def _refuse_taken(update: UpdatePlan, state: Tensors, names: Iterable[str]) -> None:
    taken = step_metrics(update, state)
    for name in names:
        if name in taken:
            raise ValueError(
                f"the metric name {name!r} is taken by the step itself; give the loss's metric another one."
            )
