"""Named groups of parameters, whose optimizer numbers differ from the default group's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion_compile._state.routing import Route, check_patterns
from fusion_compile.optim._grouped import DEFAULT, number_of
from fusion_compile.optim._schedules import Schedule

_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class NamedGroup:
    """The parameters that match one of `patterns`, and the numbers in which they differ."""

    name: str
    patterns: tuple[str, ...]
    numbers: Mapping[str, float | Schedule]


def read_groups(given: Sequence[Mapping[str, Any]], known: Mapping[str, Any], optimizer: str) -> tuple[NamedGroup, ...]:
    """Validate the `groups` of `compile_training_step`. `known`: the optimizer's hyperparameters."""
    if isinstance(given, Mapping | str) or not isinstance(given, Iterable):
        raise TypeError(
            f"groups is a {type(given).__name__}; give a list of groups, "
            f"[{{'params': [regular expressions], 'weight_decay': 0.0}}]."
        )
    groups: list[NamedGroup] = []
    for i, entry in enumerate(given):
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"groups[{i}] is a {type(entry).__name__}; give a dictionary with 'params' and the numbers that differ."
            )
        groups.append(_read_group(i, entry, known, optimizer))
        name = groups[-1].name
        if name in (group.name for group in groups[:-1]):
            raise ValueError(f"groups[{i}] is called {name!r}, as a group before it; give each a name of its own.")
    return tuple(groups)


def _read_group(i: int, entry: Mapping[str, Any], known: Mapping[str, Any], optimizer: str) -> NamedGroup:
    name = entry.get("name", f"group{i}")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == DEFAULT:
        raise ValueError(
            f"groups[{i}] has the name {name!r}; give letters, digits and underscores, and not {DEFAULT!r}, which is "
            f"the group of all other parameters."
        )
    if "params" not in entry:
        raise ValueError(f"group {name!r} lacks 'params'; list regular expressions over full parameter names.")
    patterns = entry["params"]
    if isinstance(patterns, str):
        raise TypeError(
            f"group {name!r}: params={patterns!r} is a string; give a list of regular expressions, [{patterns!r}]."
        )
    if not isinstance(patterns, Iterable):
        raise TypeError(f"group {name!r}: params is a {type(patterns).__name__}; give a list of regular expressions.")
    patterns = list(patterns)
    if not patterns:
        raise ValueError(f"group {name!r} has an empty list of params; list regular expressions, or drop the group.")
    if odd := next((p for p in patterns if not isinstance(p, str)), None):
        raise TypeError(
            f"group {name!r} lists a {type(odd).__name__} in params; give regular expressions over full parameter "
            f"names, for example [r'\\.bias$']."
        )
    numbers = {key: value for key, value in entry.items() if key not in ("name", "params")}
    for key in numbers:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"group {name!r} sets {key!r}, which {optimizer} does not have; it has {', '.join(known)}."
                + (f" Did you mean {close[0]!r}?" if close else "")
                + (" It bounds the norm over all groups; set it for the whole step." if key == "clip_grad_norm" else "")
            )
    return NamedGroup(name, tuple(patterns), numbers)


def assign(routes: Sequence[Route], groups: Sequence[NamedGroup]) -> tuple[Route, ...]:
    """`routes` with the group of every parameter. A parameter that two groups select is a ValueError."""
    names = [r.name for r in routes]
    for group in groups:
        check_patterns(f"group {group.name!r}", group.patterns, names)

    def group_of(name: str) -> str:
        fitting = [g.name for g in groups if any(re.search(p, name) for p in g.patterns)]
        if len(fitting) > 1:
            raise ValueError(f"{name} is in the groups {' and '.join(map(repr, fitting))}; a parameter has one group.")
        return fitting[0] if fitting else DEFAULT

    return tuple(replace(r, group=group_of(r.name)) for r in routes)


def refuse_unread(group: str, numbers: Iterable[str], read: Iterable[str], optimizer: str) -> None:
    """Raise ValueError for one of `numbers` that no part of the optimizer reads for the parameters of `group`.

    `group`: how the message calls it.
    """
    read = sorted(read)
    if unread := [name for name in numbers if name not in read]:
        raise ValueError(
            f"{group} sets {unread[0]!r}, but {optimizer} does not read it for these parameters. It reads "
            f"{', '.join(read)} for them; set one of these."
        )


def numbers_of(groups: Sequence[NamedGroup]) -> dict[str, float | Schedule]:
    """All groups' own numbers as hyperparameters: ``{"no_decay.weight_decay": 0.0}``."""
    return {number_of(g.name, name): value for g in groups for name, value in g.numbers.items()}
