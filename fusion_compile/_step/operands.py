"""Plain numbers that go into arithmetic on tensors: 0-dim inputs of a captured step, computed on the host.

While the step is captured, a number stands in its slot that is a Python number and remembers how it was computed. Where
torch is given such a number, it gets a 0-dim tensor in its place, an input of the program.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_compile._capture.numbers.expressions import Expression, apply, number
from fusion_compile._capture.numbers.math_calls import Followed, calls_are_asked
from fusion_compile._capture.python_state.slots import Slot, read, write
from fusion_compile._capture.rehearsal._compat import DispatchMode
from fusion_compile._step.positions import CannotFollow, PositionsFollowed

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_UNARY = ("neg", "pos", "abs", "round", "floor", "ceil", "trunc")
_ASKED: tuple[str, ...] = (
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "bool",
    "int",
    "float",
    "index",
    "hash",
    "str",
    "repr",
    "format",
)
_ASKED += ("divmod", "rdivmod")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*_BINARY, "neg", "pos", "abs")},
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "index")},
    **{"bool": bool, "int": int, "float": float, "hash": hash, "str": str, "repr": repr, "format": format},
    **{"round": round, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "divmod": divmod},
    "rdivmod": lambda a, b: divmod(b, a),
}


class NotAnOperand(ValueError):
    """A number went somewhere in the capture where no tensor can take its place."""


class _Followed:
    """A number that remembers its expression. It is no int or float, whose operators would take it for a plain one and
    forget; `isinstance` is answered as for its value. Whatever is asked of it, its value answers."""

    def __init__(self, value: int | float, expression: Expression, tensors: _Tensors) -> None:
        self.value, self.expression, self.tensors = value, expression, tensors

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch asks here wherever it takes a tensor: it gets one."""
        given = (*args, *(kwargs or {}).values())
        return next(value for value in given if _is_followed(value)).tensors.call(func, args, kwargs or {})


def _is_followed(value: Any) -> bool:
    return type(value) is _Followed


def _followed(value: Any, expression: Expression, tensors: _Tensors) -> Any:
    return _Followed(value, expression, tensors) if type(value) in (int, float) else value


def _plain(value: Any) -> Any:
    return value.value if _is_followed(value) else value


def _computed(name: str, *, reflected: bool = False) -> Callable[..., Any]:
    function = _FUNCTIONS[name]

    def method(*operands: Any) -> Any:
        if any(isinstance(operand, Tensor) for operand in operands):
            return NotImplemented
        ordered = operands[::-1] if reflected else operands
        value = function(*map(_plain, ordered))
        expression = apply(name, *(o.expression if _is_followed(o) else o for o in ordered))
        return _followed(value, expression, next(o.tensors for o in ordered if _is_followed(o)))

    return method


def _answered(name: str) -> Callable[..., Any]:
    function = _FUNCTIONS[name]
    return lambda *operands: function(*map(_plain, operands))


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    if any(isinstance(argument, Tensor) for argument in arguments):
        return NotImplemented
    expression = apply(name, *(a.expression if _is_followed(a) else a for a in arguments))
    value = apply(name, *map(_plain, arguments))(())
    return _followed(value, expression, next(a.tensors for a in arguments if _is_followed(a)))


for _name in _BINARY:
    setattr(_Followed, f"__{_name}__", _computed(_name))
    setattr(_Followed, f"__r{_name}__", _computed(_name, reflected=True))
for _name in _UNARY:
    setattr(_Followed, f"__{_name}__", _computed(_name))
for _name in _ASKED:
    setattr(_Followed, f"__{_name}__", _answered(_name))


def _full(size: Sequence[int], value: Tensor, **options: Any) -> Tensor:
    dtype = options.pop("dtype", None) or value.dtype
    return torch.empty(size, dtype=dtype, **options).copy_(value)


def _full_like(like: Tensor, value: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(like, **options).copy_(value)


_FILLED: dict[Any, Callable[..., Tensor]] = {
    torch.full: _full,
    torch.full_like: _full_like,
    Tensor.new_full: lambda like, size, value, **options: like.new_empty(size, **options).copy_(value),
}


_FACTORS = {"add": "alpha", "sub": "alpha", "addcmul": "value", "addcdiv": "value"}
"""Operators that multiply their second argument by a plain number, and that number's name."""


def _without_factor(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``average.add_(weight, alpha=n)`` with a tensor for n as ``average.add_(weight * n)``."""
    name = str(getattr(func, "__name__", "")).removeprefix("_foreach_").rstrip("_")
    if name == "lerp" and len(args) > 2 and isinstance(args[0], (list, tuple)) and isinstance(args[2], Tensor):
        return (*args[:2], [args[2]] * len(args[0])), kwargs  # of many, it takes a number or as many tensors
    factor = kwargs.get(_FACTORS.get(name, ""))
    if not isinstance(factor, Tensor) or len(args) < 2:
        return args, kwargs
    many = isinstance(args[1], (list, tuple))
    scaled = [t * factor for t in args[1]] if many else args[1] * factor
    return (args[0], scaled, *args[2:]), {k: v for k, v in kwargs.items() if v is not factor}


class Operands:
    """The operands of one captured step.

    Args:
        slots: Where the plain numbers lie.
        expressions: Of what torch is given, by the numbers in the slots' order.
        device: Where the inputs lie.
        converting: Globals of user code in which ``float(n)`` and ``int(n)`` are followed.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        expressions: Sequence[Expression],
        device: torch.device,
        converting: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._slots, self._converting = list(slots), converting
        self._expressions = {_key(expression): expression for expression in expressions}
        values = [read(slot) for slot in slots]
        # 0-dim float64 inputs on a CPU are taken for Python numbers by torch.compile, so that each value recompiles.
        self._held = {
            key: torch.zeros(1, dtype=torch.float64 if isinstance(e(values), float) else torch.int64, device=device)
            for key, e in self._expressions.items()
        }
        self._used: set[Any] = set()

    def inputs(self) -> list[Tensor]:
        """A tensor ``[1]`` for each operand, float64 or int64, with its value for the numbers as they are now."""
        values = [read(slot) for slot in self._slots]
        for key, expression in self._expressions.items():
            self._held[key].fill_(expression(values))
        return list(self._held.values())

    @contextlib.contextmanager
    def standing_in(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the slots hold numbers for which torch gets `inputs`.

        Raises NotAnOperand at the end, if torch did not get each of them.
        """
        values = [read(slot) for slot in self._slots]
        tensors = _Tensors(dict(zip(self._expressions, inputs, strict=True)))
        for i, (slot, value) in enumerate(zip(self._slots, values, strict=True)):
            write(slot, _followed(value, number(i, slot.label), tensors))
        try:
            positions = PositionsFollowed(_is_followed, _plain, lambda value: tensors._tensor(value, ()))
            with calls_are_asked(Followed(_is_followed, _plain, _called), self._converting), positions:
                yield
        except CannotFollow as error:
            raise NotAnOperand(str(error)) from error
        except TypeError as error:  # torch's parser, of a number that it wants plain
            if _Followed.__name__ in str(error):
                raise NotAnOperand("an operator takes no tensor there") from error
            raise
        finally:
            for slot, value in zip(self._slots, values, strict=True):
                write(slot, value)
        if missing := [e for key, e in self._expressions.items() if key not in tensors.used]:
            raise NotAnOperand(f"{missing[0]} is used where no tensor can stand for it")


class _NoRead(DispatchMode):  # type: ignore[misc]
    """Raises where an operator takes a 0-dim tensor for a plain number, whose value it would read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NotAnOperand("an operator wants the plain number")
        return func(*args, **(kwargs or {}))


class _Tensors:
    """What stands for followed numbers, by their expressions. `used`: the expressions that torch was given."""

    def __init__(self, tensor_of: dict[Any, Tensor]) -> None:
        self._tensor_of = tensor_of
        self.used: set[Any] = set()

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)`` with a tensor for each followed number."""
        given = [b for a in (*args, *kwargs.values()) for b in (a if type(a) in (list, tuple) else (a,))]
        others = [a for a in given if not _is_followed(a) and isinstance(a, Tensor)]

        def swapped(value: Any) -> Any:
            return self._tensor(value, others) if _is_followed(value) else value

        try:
            if func in _FILLED:  # torch would read the tensor on the host
                return _FILLED[func](*map(swapped, args), **{k: swapped(v) for k, v in kwargs.items()})
            with _NoRead():
                args, kwargs = tuple(map(swapped, args)), {k: swapped(v) for k, v in kwargs.items()}
                args, kwargs = _without_factor(func, args, kwargs)
                return func(*args, **kwargs)
        except NotAnOperand:
            raise
        except Exception as error:  # of any kind: what wants a plain number fails in its own way
            name = getattr(func, "__name__", func)
            raise NotAnOperand(f"{name} takes no tensor there ({str(error).splitlines()[0]})") from error

    def _tensor(self, value: Any, others: Sequence[Tensor]) -> Tensor:
        """The 0-dim tensor for a number, of the dtype that the number would have beside `others`."""
        key = _key(value.expression)
        if key not in self._tensor_of:
            raise NotAnOperand(f"{value.expression} was not foreseen")
        self.used.add(key)
        if others:
            dtype = torch.result_type(others[0], value.value)
        else:
            dtype = torch.get_default_dtype() if type(value.value) is float else torch.int64
        return self._tensor_of[key].reshape(()).to(dtype)


def _key(expression: Any) -> Any:
    """Equal for two expressions that compute the same in the same way."""
    if not isinstance(expression, Expression):
        return type(expression), repr(expression)
    if expression.index >= 0:
        return expression.index
    if expression.name == "constant":
        return _key(expression.arguments[0])
    return expression.name, *map(_key, expression.arguments)
