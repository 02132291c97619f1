"""What transforms that choose the step size share: they wrap another one and change the rates that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import wrapped
from fusion_compile.optim._transform import Context, Facts, Named, State, Transform, merge_hyperparameters

Diagnostics = Callable[[State], Mapping[str, Tensor]]


def check_rates(wrapper: str, base: Transform, names: Sequence[str]) -> None:
    """ValueError unless `base` reads a hyperparameter of each name."""
    absent = [name for name in names if name not in base.hyperparameters]
    if absent or not names:
        raise ValueError(
            f"{wrapper}() changes the rates {', '.join(map(repr, names)) or 'of no name'}, but {base.name} reads "
            f"{', '.join(map(repr, base.hyperparameters)) or 'no hyperparameter'}; name the rates that it reads."
        )


def with_rates(context: Context, rates: Mapping[str, Tensor]) -> Context:
    """`context` with other values of some hyperparameters."""
    return context._replace(hyperparameters={**context.hyperparameters, **rates})


def multiplied(context: Context, names: Sequence[str], factor: Tensor) -> Context:
    """`context` with the hyperparameters of these names times `factor`."""
    return with_rates(context, {name: context.hyperparameters[name] * factor for name in names})


def telling(base: Transform, own: Diagnostics) -> Diagnostics:
    """The diagnostics of a transform whose state keeps that of `base` under ``base``, and its own."""
    inner = base.diagnostics
    if inner is None:
        return own
    return lambda state: {**inner(state.base), **own(state)}


def around(
    base: Transform,
    init: Callable[[Tensors], State],
    update: Callable[[Tensors, State, Tensors, Context], tuple[Tensors, State]],
    declared: Sequence[Named],
    name: str,
    tells: Diagnostics,
    bind: Callable[[Facts], Transform],
) -> Transform:
    """A transform that keeps the roles, the gradient point and the periodic work of `base`."""
    gradient_point = None
    if base.gradient_point is not None:
        moves = base.gradient_point

        def gradient_point(params: Tensors, state: State, context: Context) -> Tensors:
            return moves(params, state.base, context)

    passed = {**wrapped(base), "diagnostics": telling(base, tells)}
    hyperparameters = merge_hyperparameters(base.hyperparameters, {n.name: n.value for n in declared})
    return Transform(
        init, update, hyperparameters, base.roles, gradient_point, f"{name}({base.name})", **passed, bind=bind
    )
