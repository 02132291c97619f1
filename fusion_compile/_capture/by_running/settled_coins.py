"""Coins that cannot come down on the other side: ``if torch.rand(1) < p`` where p is 0 or 1.

A value that decides a branch cannot be read from a tensor without data. Libraries throw a coin even where it decides
nothing (layer drop, module dropout, both 0 by default); then the outcome is known, and only the draw has to be made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWS: tuple[Any, ...] = (torch.rand, torch.rand_like)
_SAME_ENTRIES: tuple[Any, ...] = (
    Tensor.to,
    Tensor.__getitem__,
    Tensor.squeeze,
    Tensor.view,
    Tensor.reshape,
    Tensor.detach,
    Tensor.float,
)
_COMPARISONS: dict[Any, Callable[[float, float], bool]] = {
    **{getattr(Tensor, f"__{name}__"): getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
    **{getattr(Tensor, name): getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
    **{getattr(torch, name): getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
}
_READS: tuple[Any, ...] = (Tensor.__bool__, Tensor.item)


class _Known(NamedTuple):
    """What is known of a tensor, as long as nobody writes it: `outcome` of a comparison, None for draws in [0, 1)."""

    tensor: Tensor
    version: int
    outcome: bool | None


class SettledCoins(TorchFunctionMode):
    """Inside, a comparison of ``torch.rand`` with a number outside of (0, 1) has the outcome that it always has.

    ``rand() > 0`` counts as always true: fp32's draws are 0 once in 2²⁴.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, _Known] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and len(args) == 1:
            known = self._of(args[0])
            if known is not None and known.outcome is not None and args[0].numel() == 1:
                return known.outcome
        out = func(*args, **(kwargs or {}))
        if func in _DRAWS and out.is_floating_point():
            self._keep(out, None)
        elif func in _SAME_ENTRIES and (known := self._of(args[0])) is not None and out.is_floating_point():
            self._keep(out, known.outcome)
        elif func in _COMPARISONS and len(args) == 2 and type(args[1]) in (int, float):
            known = self._of(args[0])
            if known is not None and known.outcome is None and not 0 < args[1] < 1:
                self._keep(out, _COMPARISONS[func](0.5, args[1]))
        return out

    def _keep(self, tensor: Tensor, outcome: bool | None) -> None:
        self._known[id(tensor)] = _Known(tensor, tensor._version, outcome)

    def _of(self, tensor: Any) -> _Known | None:
        known = self._known.get(id(tensor))
        return known if known is not None and known.version == tensor._version else None
