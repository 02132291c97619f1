"""Parts shared by transforms that choose the step size: they wrap another transform and change the rates it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fusion_compile.optim._transform import Context, Transform, check_transform


def check_rates(wrapper: str, base: Transform, names: Sequence[str]) -> None:
    """ValueError unless `base`, checked to be a transform, reads a hyperparameter of each name."""
    check_transform(f"{wrapper}(), base,", base)
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
