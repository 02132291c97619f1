"""Leaves that the loss takes for the model's parameters: a copy of each one's value, under the parameter's identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusion_compile._capture.by_running._compat import mark_as_parameter, patched


def leaf_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A leaf with `value`, that ``isinstance`` holds for an ``nn.Parameter`` and that carries the parameter's own
    attributes (tags such as ``p.no_decay``)."""
    leaf = value.detach().requires_grad_()
    mark_as_parameter(leaf)
    return tagged(leaf, parameter)


def tagged(leaf: Tensor, parameter: Tensor) -> Tensor:
    """`leaf` with the attributes that user code has put on `parameter`."""
    for name, tag in vars(parameter).items():
        if not name.startswith("_"):
            setattr(leaf, name, tag)
    return leaf


class _Stray(TorchFunctionMode):
    """Gives torch the leaf wherever user code hands it the parameter itself."""

    def __init__(self, leaf_of: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._leaf_of = leaf_of

    def swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._leaf_of.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self.swap(v) for v in value)
        if type(value) is dict:
            return {k: self.swap(v) for k, v in value.items()}
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(self.swap, args), **{k: self.swap(v) for k, v in (kwargs or {}).items()})


@contextmanager
def parameters_are_leaves(leaves: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, a parameter that user code kept outside of the model (a list of weights to penalize) counts as its leaf.

    Args:
        leaves: Leaf by full parameter name.
        parameters: The model's parameters by the same names.
    """
    stray = _Stray({id(parameters[name]): leaf for name, leaf in leaves.items()})
    original = torch.autograd.Function.__dict__["apply"]

    def with_leaves(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # An autograd.Function is not seen by torch function modes.
        return original.__get__(None, cls)(*map(stray.swap, args), **{k: stray.swap(v) for k, v in kwargs.items()})

    with patched(torch.autograd.Function, "apply", classmethod(with_leaves)), stray:
        yield
