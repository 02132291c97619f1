"""Private torch API of the capture room, behind feature probes. torch 2.11 to 2.15; never a version compare."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

SeeOperator = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


class SeenFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A `FakeTensorMode` with a `ShapeEnv` that shows every operator the program calls to `see`.

    `see` gets ``(operator, args, kwargs, result)``. Operators that torch's own shape functions call inside another
    operator are not shown.
    """

    def __init__(self, see: SeeOperator) -> None:
        # A value read on the host, and a shape that depends on one, are refused as they are without symbols.
        env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        super().__init__(allow_non_fake_inputs=True, shape_env=env)
        self._see = see
        self._depth = 0
        self._caches = bool(self.cache_enabled)  # a torch without this switch is no torch for numbers, see the probe

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._depth += 1
        # A result from the cache would skip the guards of a symbol.
        self.cache_enabled = self._caches and not any(isinstance(leaf, SYMBOLIC) for leaf in leaves((args, kwargs)))
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if not self._depth and func.namespace != "prim":  # prim::device is asked for, not computed
            self._see(func, args, kwargs or {}, out)
        return out


def new_symbol(env: Any, value: int | float, name: str) -> Any:
    """A `SymInt` or `SymFloat` of its own that stands for `value`; 0 and 1 are not specialized."""
    source = ConstantSource(name)
    symbol = env.create_symbol(
        value,
        source,
        dynamic_dim=DimDynamic.DYNAMIC,
        constraint_dim=None,
        positive=None,
        do_not_specialize_zero_one=True,
    )
    make = env.create_symintnode if isinstance(value, int) else env.create_symfloatnode
    return make(symbol, hint=value, source=source)


@contextlib.contextmanager
def guards_seen(env: Any, see: Callable[[Any, Any], None], is_aside: Callable[[], bool]) -> Iterator[list[Any]]:
    """Inside, `see(node, outcome)` is called when Python asks a symbolic number for its value. Where `is_aside()` the
    value is given away without a guard. The list that is yielded holds, at the end, the guards that came about in
    another way."""
    plain = env.evaluate_sym_node
    asked: set[int] = set()

    def evaluate(node: Any, *args: Any, **kwargs: Any) -> Any:
        if is_aside():
            return node.hint
        before = len(env.guards)
        outcome = plain(node, *args, **kwargs)
        asked.update(range(before, len(env.guards)))
        see(node, outcome)
        return outcome

    others: list[Any] = []
    env.evaluate_sym_node = evaluate
    try:
        yield others
    finally:
        env.evaluate_sym_node = plain
        others += [guard.expr for i, guard in enumerate(env.guards) if i not in asked]


@functools.cache
def why_numbers_cannot_be_followed() -> str:
    """What this torch does otherwise than a symbol in the place of a plain number needs, or ``""``.

    A symbol is made, and a question about it must be seen; fake results must be computed anew, as a cached one asks
    nothing.
    """
    asked: list[Any] = []
    try:
        mode = SeenFakeMode(lambda *_: None)
        number = new_symbol(mode.shape_env, 3, "number")
        with guards_seen(mode.shape_env, lambda _, outcome: asked.append(bool(outcome)), lambda: False) as others:
            answers = bool(number < 5), bool(number > 7)
    except Exception as error:
        return f"this torch ({torch.__version__}) has other symbolic numbers ({type(error).__name__}: {error})"
    if answers != (True, False) or asked != [True, False] or others:
        return f"this torch ({torch.__version__}) answers for symbolic numbers out of sight"
    return ""


def node_of(number: Any) -> Any:
    """What a symbolic number is inside; the same object wherever the number went."""
    return number.node


def expression_of(number: Any) -> Any:
    """The sympy expression of a symbolic number; symbols that a guard fixed are replaced by their values."""
    return number.node.expr


def hint_of(number: Any) -> Any:
    """The plain value that a symbolic number stands for."""
    return number.node.hint


def leaves(tree: Any) -> list[Any]:
    """What lies in nested lists, tuples and dictionaries."""
    return list(pytree.tree_leaves(tree))


def given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """``(name, type, value)`` of the arguments of an operator's call, as its schema has them."""
    arguments = _arguments(func)
    by_place = [(name, kind, v) for (name, kind), v in zip(arguments, args, strict=False)]
    return by_place + [(name, kind, kwargs[name]) for name, kind in arguments if name in kwargs]


@functools.lru_cache(maxsize=4096)
def _arguments(func: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in func._schema.arguments]


def has_data(tensor: Tensor) -> bool:
    """Whether `tensor` holds numbers that can be read without waiting for a device."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu" and not tensor.is_sparse


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""The classes that stand for a plain int, float and bool while Python runs on fake tensors."""
