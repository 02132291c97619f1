"""One call of a denoiser, taken apart into tensors, constants, and a key of everything its graph depends on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.opened import PLAIN, closed, holds_objects, identity_of, opened, unknown_leaves
from fusion_compile.passes._compat import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Dim = tuple[int, int]
"""One size of a call: (which of its tensors, which dimension)."""


class CallKey(NamedTuple):
    """Equal for calls that one exported graph can serve.

    `owners`: for each tensor the argument it is in. `positional`: the arguments that came by position, or None if the
    model cannot tell. `constants`: (argument, type, value) of every leaf that is no
    tensor. `autocast`: its dtype or None. `layouts`: for each tensor its strides, or None if it is contiguous or has
    fewer than two dimensions; an operator that gives a view of one layout copies another.
    """

    owners: tuple[str, ...]
    structure: TreeSpec
    positional: tuple[str, ...] | None
    kinds: tuple[tuple[int, torch.dtype, torch.device], ...]
    constants: tuple[tuple[str, type, Any], ...]
    autocast: torch.dtype | None
    sizes: tuple[tuple[int, ...], ...]
    layouts: tuple[tuple[int, ...] | None, ...]

    @property
    def family(self) -> tuple[Any, ...]:
        """Equal for calls that differ only in sizes and layouts."""
        return self[:6]


@dataclass(frozen=True)
class Call:
    """`arguments`: name -> value, with objects opened; what ``*args`` takes is called ``args[0]``, and what
    ``**kwargs`` takes by its own name. `positional`: the arguments that came by position, in order. `tensors`: the
    tensor leaves, in the order of `key.owners`. `given`: the arguments as they came. `numbers`: arguments that came as
    Python numbers, and stand as tensors ``[]`` in `arguments`. `method`: of the model, which is called."""

    arguments: dict[str, Any]
    positional: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    key: CallKey
    given: Mapping[str, Any]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    method: str = "forward"

    @property
    def owners(self) -> tuple[str, ...]:
        """For each tensor the argument it is in."""
        return self.key.owners

    def rebuild(self, tensors: Iterable[Tensor]) -> dict[str, Any]:
        """The arguments with `tensors` in place of `self.tensors`; containers and objects are new ones."""
        fresh = iter(tensors)
        leaves, structure = tree_flatten(self.arguments)
        replaced = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        rebuilt: dict[str, Any] = tree_unflatten(replaced, structure)
        return {name: closed(value) for name, value in rebuilt.items()}

    def unknown(self) -> tuple[str, object] | None:
        """An argument that holds an object of which nothing is known, and the object; None without one."""
        found = ((name, leaf) for name, value in self.arguments.items() for leaf in unknown_leaves(value))
        return next(found, None)


def take_apart(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, keywords_matter: bool = True
) -> Call:
    """Bind a call to `signature`; raise TypeError as the call itself would.

    `keywords_matter`: whether the model can tell an argument by keyword from one by position; see `sees_keywords`.
    """
    arguments, positional = named_arguments(signature.bind(*args, **kwargs), kwargs)
    return call_of(arguments, positional, keywords_matter=keywords_matter)


def named_arguments(bound: inspect.BoundArguments, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of a call by name, and which of them came by position, in order; `kwargs` came by keyword."""
    arguments: dict[str, Any] = {}
    positional: list[str] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            if clash := sorted(arguments.keys() & value.keys()):
                raise TypeError(f"{clash[0]!r} is given by position and again in **{name}; rename one of them.")
            arguments |= dict(sorted(value.items()))
            continue
        found = {name: value}
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found = {f"{name}[{i}]": one for i, one in enumerate(value)}
        arguments |= found
        if kind is inspect.Parameter.POSITIONAL_ONLY or name not in kwargs:
            positional += found
    return arguments, tuple(positional)


def call_of(arguments: dict[str, Any], positional: tuple[str, ...], *, keywords_matter: bool = True) -> Call:
    """The call with `arguments`, those in `positional` by position and the others by keyword."""
    tensors: list[Tensor] = []
    owners: list[str] = []
    constants: list[tuple[str, type, Any]] = []
    given, arguments = arguments, {n: opened(v) if holds_objects(v) else v for n, v in arguments.items()}
    for name, value in arguments.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                owners.append(name)
            else:
                constants.append((name, type(leaf), identity_of(leaf)))
    device = tensors[0].device.type if tensors else "cpu"
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    key = CallKey(
        owners=tuple(owners),
        structure=tree_flatten(arguments)[1],
        positional=positional if keywords_matter else None,
        kinds=tuple((t.dim(), t.dtype, t.device) for t in tensors),
        constants=tuple(constants),
        autocast=torch.get_autocast_dtype(device) if casts else None,
        sizes=tuple(tuple(t.shape) for t in tensors),
        layouts=tuple(None if t.dim() < 2 or t.is_contiguous() else t.stride() for t in tensors),
    )
    return Call(arguments, positional, tuple(tensors), key, given)


def with_tensors_for(call: Call, names: Iterable[str]) -> Call:
    """`call` with tensors ``[]`` in place of the numbers among its arguments `names`: int64, or float64 where the
    device has it. The key tells the call from one with tensors."""
    numbers = {n: call.arguments[n] for n in names if _is_number(call.arguments.get(n))}
    if not numbers:
        return call
    device = call.tensors[0].device if call.tensors else torch.device("cpu")
    exact = torch.float32 if device.type == "mps" else torch.float64
    tensors = {
        name: torch.tensor(value, dtype=torch.int64 if isinstance(value, Integral) else exact, device=device)
        for name, value in numbers.items()
    }
    fresh = call_of({**call.arguments, **tensors}, call.positional, keywords_matter=call.key.positional is not None)
    kinds = tuple((name, type(value), "a number") for name, value in numbers.items())
    key = fresh.key._replace(constants=fresh.key.constants + kinds)
    return replace(fresh, key=key, given=call.given, numbers=numbers, method=call.method)


def sees_keywords(model: nn.Module, method: str = "forward") -> bool:
    """Whether calls that differ only in what is passed by keyword may differ in effect.

    A wrapper around ``forward`` may look for a name among the keywords, as diffusers' for a LoRA scale does, and a hook
    may. A plain function with names of its own cannot tell.
    """
    forward = getattr(model, method)
    function = forward.__func__ if inspect.ismethod(forward) else None
    plain = inspect.isfunction(function) and not {"__wrapped__", "__signature__"} & vars(function).keys()
    if method != "forward":
        return not plain
    hooked = model._forward_pre_hooks or model._forward_hooks
    return not plain or bool(hooked) or type(model).__call__ is not nn.Module.__call__


def invoke(module: Callable[..., Any], call: Call, arguments: Mapping[str, Any]) -> Any:
    """Call `module`, or its method if the call is of one, with `arguments` in place of those of `call`.

    Each goes by position or by keyword as there.
    """
    by_keyword = {name: value for name, value in arguments.items() if name not in call.positional}
    called = module if call.method == "forward" else getattr(module, call.method)
    return called(*(arguments[name] for name in call.positional), **by_keyword)


def name_dim(owners: Sequence[str], dim: Dim) -> str:
    """``x.shape[0]``, or ``ids(2).shape[0]`` for the second of an argument's tensors."""
    tensor, axis = dim
    owner = owners[tensor]
    place = f"({owners[: tensor + 1].count(owner)})" if owners.count(owner) > 1 else ""
    return f"{owner}{place}.shape[{axis}]"


def what_varies(keys: Iterable[CallKey]) -> str:
    """The arguments in which calls differ: ``x float32[2, 4] cpu / float32[3, 4] cpu; height 8 / 16``."""
    described = [_describe(key) for key in keys]
    varying = []
    for name in dict.fromkeys(name for one in described for name in one):
        values = dict.fromkeys(one.get(name, "left out") for one in described)
        if len(values) > 1:
            varying.append(f"{name} {' / '.join(values)}")
    return "; ".join(varying)


def _describe(key: CallKey) -> dict[str, str]:
    said: dict[str, list[str]] = {}
    for owner, (_, dtype, device), sizes, layout in zip(key.owners, key.kinds, key.sizes, key.layouts, strict=True):
        strides = "" if layout is None else f" with strides {list(layout)}"
        said.setdefault(owner, []).append(f"{str(dtype).removeprefix('torch.')}{list(sizes)} {device}{strides}")
    for name, kind, value in key.constants:
        said.setdefault(name, []).append(repr(value) if issubclass(kind, PLAIN) else f"a {kind.__name__}")
    by_position = "" if key.positional is None else ", ".join(key.positional) or "nothing"
    return {
        **{name: ", ".join(parts) for name, parts in said.items()},
        "by position:": by_position,
        "autocast": str(key.autocast),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
