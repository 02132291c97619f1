"""Hooks that move a large gradient into its place in a bank as soon as it is complete, while it is in the cache.

``.grad`` is then a view of that place. The memory that backward had taken for the gradient is free for the next one, so
that a step has one set of gradients, whose pages are never new to the operating system. Each place has a storage of its
own, whose count of references tells whether somebody (gradient surgery, a monitor) still holds what lies there.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._torch_optim._compat import references_to_memory
from fusion_compile._types import Tensors

LARGE = 1 << 15
"""Bytes from which a gradient is moved by itself; smaller ones are copied together."""


def _references_to_a_gradient() -> int:
    """What ``sys.getrefcount`` says of a ``.grad`` that nobody else holds."""
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.zeros(1)
    given = p.grad
    return sys.getrefcount(given)


_NOBODY_ELSE = _references_to_a_gradient()


class Lent(NamedTuple):
    """A place of a gradient: `tensor` over it, with a storage of its own, and how many references this has at rest."""

    tensor: Tensor
    at: int
    at_rest: int

    @property
    def held(self) -> bool:
        """Whether somebody has a view of the place, ``.grad`` among them."""
        return references_to_memory(self.tensor) != self.at_rest


class MovedGradients:
    """The hooks of one group's large parameters, until it is dropped.

    `members`, `places`: parameters and parts of the banks, by name.
    """

    def __init__(self, members: Mapping[str, nn.Parameter], places: Tensors) -> None:
        self._lent: dict[str, Lent] = {}
        self._handles: list[Any] = []
        self.stopped = False
        weakref.finalize(self, _take_off, self._handles)
        weakly = weakref.ref(self)
        for name, place in places.items():
            p = members[name]
            if place.nbytes < LARGE or type(p) is not nn.Parameter or references_to_memory(place) == 0:
                continue
            own = torch.from_dlpack(place)  # type: ignore[attr-defined]
            self._lent[name] = Lent(own, own.data_ptr(), references_to_memory(own))
            untyped: Any = p  # torch gives this one no types
            self._handles.append(untyped.register_post_accumulate_grad_hook(_Hook(weakly, self._lent[name])))

    def in_place(self, given: Tensors) -> frozenset[str]:
        """Names of the gradients that lie in their places."""
        return frozenset(n for n, place in self._lent.items() if n in given and given[n].is_set_to(place.tensor))

    def must_end(self, in_place: frozenset[str]) -> bool:
        """Whether somebody holds what lies in a place that is written next, which all but those of `in_place` are."""
        return self.stopped or any(place.held for name, place in self._lent.items() if name not in in_place)

    def stop(self) -> None:
        """Move no more gradients."""
        self.stopped = True


class _Hook:
    """What hangs on a parameter. It knows its owner weakly, and a copy of the parameter has none."""

    def __init__(self, owner: weakref.ref[MovedGradients], place: Lent) -> None:
        self._owner, self._place = owner, place

    def __call__(self, p: Tensor) -> None:
        if torch.compiler.is_compiling() or (owner := self._owner()) is None or owner.stopped:
            return
        given, place = p.grad, self._place
        if given is None or given.data_ptr() == place.at:  # added to what lies there
            return
        if not (_fits(given, place.tensor) and sys.getrefcount(given) == _NOBODY_ELSE and _is_alone(given)):
            return  # a graph of a second derivative, DDP's bucket, somebody's buffer: it is copied in the step
        if place.held:
            return owner.stop()
        moved = place.tensor.detach()
        moved.copy_(given)
        p.grad = moved


def _fits(gradient: Tensor, place: Tensor) -> bool:
    return (
        type(gradient) is Tensor
        and gradient.layout is torch.strided
        and gradient.shape == place.shape
        and gradient.dtype == place.dtype
        and gradient.device == place.device
        and not gradient.requires_grad
    )


def _is_alone(gradient: Tensor) -> bool:
    """Whether no other tensor lies in the gradient's memory: one reference is its own, one that of the question."""
    return references_to_memory(gradient) <= 2


def _take_off(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
