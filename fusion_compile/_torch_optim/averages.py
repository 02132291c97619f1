"""Averages of the weights that a torch optimizer keeps: shown in their models when a group's banks are made."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_compile._state.kept_average import KeptAverage, banks_of, counter_of
from fusion_compile._torch_optim.parameter_group import ParameterGroup


def bind_averages(averages: Sequence[KeptAverage], group: ParameterGroup) -> None:
    """Let each of `averages` show what `group` keeps of it, by the names that parameters have in its own model.

    Raises ValueError for a parameter that this model does not have.
    """
    for kept in averages:
        views = group.layout.views(banks_of(kept.average, group.layout, group.state))
        names = {id(p): name for name, p in kept.trained.named_parameters()}
        if stranger := next((n for n, p in group.members.items() if id(p) not in names), None):
            p = group.members[stranger]
            raise ValueError(
                f"{stranger} {list(p.shape)} is no parameter of the model that EMA {kept.average.name!r} is an average "
                f"of; give that model's parameters, or EMA(model) the module that has them all."
            )
        own = {names[id(group.members[n])]: view for n, view in views.items()}
        kept.bind(group.at, own, counter_of(kept.average, group.state))
