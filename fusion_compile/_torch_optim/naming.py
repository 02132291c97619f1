"""Names of parameters that come without: from the model, or from the module whose names the others have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fusion_compile._torch_optim.named_groups import names_of
from fusion_compile._torch_optim.parameter_group import Holder
from fusion_compile._tracked import tracked

_PLACE = "param_groups["
"""How the name of a parameter begins that has none: the expression that leads to it."""


def alive_modules() -> list[nn.Module]:
    """All modules that anybody holds, except those that only hold parameters for us."""
    # type(), because isinstance() asks proxies for their __class__, which runs their code.
    found = (o for o in tracked() if issubclass(type(o), nn.Module))
    return [m for m in found if not isinstance(m, Holder)]


def full_names(given: Sequence[Any], at: int, known: Mapping[str, nn.Parameter], model: nn.Module | None) -> list[str]:
    """A name for each entry of group `at`, a tensor or a pair; none is in `known`, nor twice in the group.

    A tensor that comes without a name has the one of `model`, or of the module in which the parameters `known` have
    theirs, or else the expression that leads to it.
    """
    names = names_of(given, at)
    plain = [i for i, entry in enumerate(given) if not isinstance(entry, tuple)]
    root = model if model is not None or not plain else _root_of(known)
    if plain and root is not None:
        of = {id(p): name for name, p in root.named_parameters()}
        for i in plain:
            names[i] = of.get(id(given[i]), names[i])
    return list(_apart(names, set(known)))


def has_place_only(name: str) -> bool:
    """Whether `name` says where a parameter stands and not what it is called."""
    return name.startswith(_PLACE)


def undecided(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of `names` that say where a parameter stands only, and of which no pattern says how it is updated."""
    return [n for n in names if has_place_only(n) and not any(re.search(pattern, n) for pattern in patterns)]


def _apart(names: Sequence[str], taken: set[str]) -> Iterator[str]:
    """`names`, with a number behind those that are taken: two models may use one name."""
    for name in names:
        other, count = name, 1
        while other in taken:
            count += 1
            other = f"{name} ({count})"
        taken.add(other)
        yield other


def _root_of(known: Mapping[str, nn.Parameter]) -> nn.Module | None:
    """A module in which a parameter has the name that it has in `known`."""
    named = next(((n, p) for n, p in known.items() if not has_place_only(n)), None)
    if named is None:
        return None
    name, p = named
    return next((m for m in alive_modules() if _parameter(m, name) is p), None)


def _parameter(module: nn.Module, name: str) -> object:
    """What lies under the full `name`, read without the modules' own __getattr__."""
    *path, last = name.split(".")
    at: Any = module
    for step in path:
        at = (vars(at).get("_modules") or {}).get(step)
        if at is None:
            return None
    return (vars(at).get("_parameters") or {}).get(last)
