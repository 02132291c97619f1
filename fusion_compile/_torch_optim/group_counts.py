"""A group counts its steps for all its parameters. torch.optim counts those of each; where that differs, it is said."""

from __future__ import annotations

from collections.abc import Collection

from fusion_compile._say_once import SayOnce
from fusion_compile._torch_optim.one_form import is_shared
from fusion_compile._torch_optim.parameter_group import ParameterGroup


class GroupCounts:
    """Which parameters went without a gradient in a step of their group."""

    def __init__(self) -> None:
        self._went_without: dict[int, set[str]] = {}

    def missing(self, group: ParameterGroup, given: Collection[str], warn: SayOnce) -> frozenset[str]:
        """The parameters of `group` that are not `given`, in a step that is taken now.

        Warns of one that has a gradient again or at last, if the update depends on how many steps were taken.
        """
        missing = frozenset(group.members).difference(given)  # of several ranks' parameters a group has its own
        before = self._went_without.get(group.at)
        if before and (back := sorted(before - missing)):
            before.difference_update(back)
            if any(is_shared(group.layout, key, tensor) for key, tensor in group.state.items()):
                warn(
                    "counts",
                    f"{back[0]} has a gradient, and had none in an earlier step of its group. A group counts steps for "
                    f"all its parameters, so Adam's bias correction is over for this one, too, where torch.optim "
                    f"counts for each. optim.leave_unread(recipe) keeps a count for each parameter.",
                )
        if missing:
            self._went_without.setdefault(group.at, set()).update(missing)
        return missing
