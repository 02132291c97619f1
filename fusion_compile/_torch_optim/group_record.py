"""What belongs to one of ``param_groups`` and is no number: names, schedules, banks, and gradients as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._torch_optim.group_numbers import as_float
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile._types import Tensors
from fusion_compile.optim._schedules import Schedule

_layout, _dtype = attrgetter("layout"), attrgetter("dtype")


@dataclass
class GroupRecord:
    """What belongs to one of ``param_groups`` and is no number.

    `seen`: the numbers as last read. `group`: its banks, None before its first step. `tensors`: numbers that are
    tensors, with the version and the value as last read. `form`: its parameters in words, for other ranks.
    """

    names: list[str]
    schedules: dict[str, Schedule]
    seen: dict[str, Any]
    group: ParameterGroup | None = None
    tensors: dict[str, tuple[Tensor, int, Any]] = field(default_factory=dict)
    form: str | None = None

    def pairs(self, options: dict[str, Any]) -> list[tuple[str, nn.Parameter]]:
        """The group's parameters with their names. `options`: its entry of ``param_groups``."""
        return [*zip(self.names, options["params"], strict=True)]

    def read(self, name: str, value: Any) -> Any:
        """`value` as a float, a schedule as itself. A tensor is read again when it was written, or is another: reading
        one waits for its device."""
        if not isinstance(value, Tensor):
            return value if callable(value) else as_float(value)
        known = self.tensors.get(name)
        if known is None or known[0] is not value or known[1] != value._version:
            known = self.tensors[name] = (value, value._version, as_float(value))
        return known[2]


def gradients_of(named: Iterable[tuple[str, Tensor]]) -> Tensors:
    """The gradients by parameter. A gradient that no bank holds is a RuntimeError."""
    pairs = [*named]
    gradients: list[Any] = [p.grad for _, p in pairs]
    there = [*map(is_not, gradients, repeat(None))]
    if not all(there):
        pairs, gradients = [*compress(pairs, there)], [*compress(gradients, there)]
    names, parameters = zip(*pairs, strict=True) if pairs else ((), ())
    if (
        {*map(_layout, gradients)} <= {torch.strided}
        and [*map(_dtype, gradients)] == [*map(_dtype, parameters)]
        and [*map(Tensor.get_device, gradients)] == [*map(Tensor.get_device, parameters)]
    ):
        return dict(zip(names, gradients, strict=True))
    for (name, p), g in zip(pairs, gradients, strict=True):
        if g.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of {name} {list(p.shape)} is sparse ({g.layout}); make it dense "
                f"(nn.Embedding(sparse=False)), or give the parameter to torch.optim.SparseAdam."
            )
        if g.dtype != p.dtype or g.device != p.device:
            raise RuntimeError(
                f"the gradient of {name} {list(p.shape)} is {g.dtype} on {g.device}, the parameter {p.dtype} on "
                f"{p.device}; convert it before optimizer.step()."
            )
    return dict(zip(names, gradients, strict=True))


def names_in(records: Iterable[GroupRecord], param_groups: Iterable[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """All parameters by name."""
    pairs = zip(records, param_groups, strict=True)
    return {n: p for record, options in pairs for n, p in zip(record.names, options["params"], strict=True)}
