"""Which live numbers a transform uses for given banks, found by one update on tensors without data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Transform


class _UsedTensors(TorchFunctionMode):
    """Inside, collect which of `watched` are an argument of a torch function. Handing one on is no use of it."""

    def __init__(self, watched: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(t): name for name, t in watched.items()}
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs or {}))
        self.used |= {self._names[id(t)] for t in given if id(t) in self._names}
        return func(*args, **(kwargs or {}))


def numbers_used(transform: Transform, params: Tensors) -> frozenset[str] | None:
    """Names of the hyperparameters that `transform`, which knows its banks, uses for the banks `params`.

    None where the transform needs values and cannot run on tensors without data.
    """
    banks = {k: torch.empty_like(p, device="meta") for k, p in params.items()}
    dtype = next(iter(banks.values())).dtype
    numbers = {name: torch.empty((), dtype=dtype, device="meta") for name in transform.hyperparameters}
    loss = torch.empty((), dtype=dtype, device="meta")
    try:
        with torch.no_grad(), _UsedTensors(numbers) as seen:
            state = transform.init(banks)
            for due in (False, True) if transform.period else (False,):
                context = Context(numbers, loss, due)
                transform.update(dict(banks), state, banks, context)
                if transform.gradient_point is not None:
                    transform.gradient_point(banks, state, context)
                for work in transform.periodic:
                    work.update(state, banks, context)
    except Exception:  # of any kind: a part that reads a value fails in its own way
        return None
    return frozenset(seen.used)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _in_each(tree.values())
    elif isinstance(tree, tuple | list):
        yield from _in_each(tree)


def _in_each(trees: Iterable[Any]) -> Iterator[Tensor]:
    for tree in trees:
        yield from _tensors(tree)
