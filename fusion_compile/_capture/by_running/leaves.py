"""Leaves that the loss takes for the model's parameters: a copy of each one's value, under the parameter's identity."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusion_compile._capture.by_running._compat import mark_as_parameter, patched
from fusion_compile._capture.python_state.slots import Slot, read
from fusion_compile._capture.python_state.whose_code import is_user_code
from fusion_compile._shared_memory import left_behind, memory_of, part_of

_PUT_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_GET_GRADIENT: Any = Tensor.grad.__get__  # type: ignore[union-attr]


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


def standing_for(original: Tensor, value: Tensor) -> Tensor:
    """`value`, which user code takes for `original`: a parameter if that is one."""
    if isinstance(original, nn.Parameter):
        mark_as_parameter(value)
    return tagged(value, original)


class StandingIn(TorchFunctionMode):
    """Gives torch what stands for a tensor wherever user code hands it the tensor itself, and its part wherever user
    code hands it a part (a view that is kept, ``parameter.data``).

    Another tensor that is put into one of them (``tensor.data = …``) stands for it from then on: a graph that is being
    written down does not see the exchange.

    Args:
        pairs: By name, each tensor and what stands for it.
    """

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]], *, data_may_be_put: bool = True) -> None:
        super().__init__()
        self._stand_in = {id(original): value for original, value in pairs.values()}
        self._by_memory: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        for name, (original, value) in pairs.items():
            # What shares the memory of what stands there is its part already.
            if (memory := memory_of(original)) is not None and memory != memory_of(value):
                self._by_memory.setdefault(memory, []).append((name, original, value))
        self._odd: tuple[Tensor, str] | None = None
        self._kept: list[Tensor] = list(self._stand_in.values())  # an id is a name only while its object lives
        self.handed: set[int] = set()
        """The identities of those tensors that torch was handed, and made another one of."""
        self.without_gradient: set[int] = set()
        """The identities of what stands for tensors whose ``.grad`` user code read, and which had none."""
        self._hit: list[int] = []
        self._watched = {*self._stand_in, *map(id, self._stand_in.values())} if data_may_be_put else set()

    def swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self._stand_in.get(id(value))
            if found is None:
                return self._part(value)
            self._hit.append(id(value))
            return found
        if type(value) in (list, tuple):
            return type(value)(self.swap(v) for v in value)
        if type(value) is dict:
            return {k: self.swap(v) for k, v in value.items()}
        return value

    def _part(self, view: Tensor) -> Tensor:
        """What `view` is of a tensor that something stands for, or `view` itself."""
        if left_behind.get(id(view)) is view:
            self._odd = view, "several parameters"
        owners = self._by_memory.get(memory_of(view) or 0, ())
        for _, original, value in owners:
            differentiable = view.requires_grad and not view.is_leaf
            part = part_of(view, original, value if differentiable else value.detach())
            if part is not None:
                self._hit.append(id(original))
                return part.requires_grad_() if view.requires_grad and view.is_leaf else part
        if owners:
            self._odd = view, owners[0][0]
        return view

    def _refuse_odd(self) -> None:
        """Raise ValueError if torch was just handed a tensor whose part of another cannot be told."""
        if self._odd is not None:
            view, of = self._odd
            raise ValueError(
                f"the loss reads or writes a tensor {list(view.shape)} {view.dtype} that shares memory with {of} and "
                f"is no plain part of one of the model's tensors; the step computes on others than these. Make it "
                f"from the model's own tensor in the loss, or keep a clone()."
            )

    def now(self, original: Tensor, slots: Sequence[Slot]) -> Tensor:
        """What stands for `original` at the end: what user code has put into `slots`, which led to it."""
        found = read(slots[0]) if slots else original
        return self._stand_in.get(id(found), found) if isinstance(found, Tensor) else found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _PUT_DATA and id(args[0]) in self._watched:
            self._put(args[0], self.swap(args[1]))
            return None
        self._hit, self._odd = [], None
        swapped = [*map(self.swap, args)], {k: self.swap(v) for k, v in (kwargs or {}).items()}
        hit, out = self._hit, func(*swapped[0], **swapped[1])
        if out is None and func == _GET_GRADIENT and is_user_code(sys._getframe(1).f_code.co_filename):
            self.without_gradient.add(id(swapped[0][0]))
        computes = isinstance(out, (Tensor, list, tuple)) and type(out) is not torch.Size
        if computes or func == Tensor.__setitem__:
            self._refuse_odd()
            self.handed.update(hit)
        return out

    def _put(self, into: Tensor, value: Tensor) -> None:
        """From now on `value` stands for `into`, and for whatever else `into` stood for."""
        new = standing_for(into, value.detach())
        was = self._stand_in.get(id(into), into)
        for key, standing in list(self._stand_in.items()):
            if standing is was:
                self._stand_in[key] = new
        self._kept.append(was)
        self._stand_in[id(was)] = new
        self._watched.add(id(new))


@contextmanager
def parameters_are_leaves(leaves: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> Iterator[StandingIn]:
    """Inside, a parameter that user code kept outside of the model (a list of weights to penalize) counts as its leaf,
    and a buffer as what stands for it.

    Args:
        leaves: What stands for a parameter or a buffer, by its full name.
        originals: The model's own by the same names.
    """
    stray = StandingIn({name: (originals[name], leaf) for name, leaf in leaves.items()}, data_may_be_put=False)
    with standing_in(stray):
        yield stray


@contextmanager
def standing_in(stray: StandingIn) -> Iterator[None]:
    """Inside, torch gets what `stray` says."""
    original = torch.autograd.Function.__dict__["apply"]

    def with_stand_ins(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # An autograd.Function is not seen by torch function modes.
        stray._hit, stray._odd = [], None
        given = [*map(stray.swap, args)], {k: stray.swap(v) for k, v in kwargs.items()}
        stray._refuse_odd()
        stray.handed.update(stray._hit)
        return original.__get__(None, cls)(*given[0], **given[1])

    with patched(torch.autograd.Function, "apply", classmethod(with_stand_ins)), stray:
        yield
