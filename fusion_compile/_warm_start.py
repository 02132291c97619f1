"""What of one recipe's checkpoint another recipe can go on with, matched by field and parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_compile._types import Tensors


@dataclass(frozen=True)
class WarmStart:
    """`carried`, `fresh`: entries of the optimizer's state that came from the checkpoint, and that begin anew;
    `unused`: entries of the checkpoint that this recipe has no place for. Names are ``<field>.<parameter>``."""

    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        def fields(names: tuple[str, ...]) -> str:
            return ", ".join(dict.fromkeys(n.partition(".")[0] for n in names)) or "nothing"

        return f"carried {fields(self.carried)}; begins anew: {fields(self.fresh)}; not used: {fields(self.unused)}"


def _by_field(entries: Mapping[str, Tensor], parameters: tuple[str, ...]) -> dict[str, list[str]]:
    """``{"z.blocks.0.weight": [entry names]}``: where in the recipe a part stands does not matter, what it is does."""
    found: dict[str, list[str]] = {}
    by_length = sorted(parameters, key=len, reverse=True)
    for name in entries:
        parameter = next((p for p in by_length if name.endswith(f".{p}")), None)
        path = name if parameter is None else name.removesuffix(f".{parameter}")
        field = path.rpartition(".")[2]
        found.setdefault(field if parameter is None else f"{field}.{parameter}", []).append(name)
    return found


def carry_over(saved: Mapping[str, Any], own: Tensors, parameters: tuple[str, ...]) -> WarmStart:
    """Copy what fits from the saved optimizer entries into `own` (views of the state by name), and say what did.

    An entry fits when the field (``z``, ``mu``, ``nu``, ``weight_sum``, …), the parameter and the shape are the same,
    and the checkpoint has one value for it: where it has several that differ (two parts' counts), none is taken.
    """
    given = _by_field(saved, parameters)
    wanted = _by_field(own, parameters)
    carried: list[str] = []
    for key, targets in wanted.items():
        values = [saved[name] for name in given.get(key, ())]
        if not values or any(v.shape != values[0].shape or not torch.equal(v, values[0]) for v in values):
            continue
        if any(own[t].shape != values[0].shape for t in targets):
            continue
        with torch.no_grad():
            for target in targets:
                own[target].copy_(values[0])
        carried.append(key)
    taken = set(carried)
    return WarmStart(
        tuple(carried), tuple(k for k in wanted if k not in taken), tuple(k for k in given if k not in taken)
    )
