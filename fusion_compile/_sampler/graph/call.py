"""One call of a denoiser, taken apart into tensors, constants, and a key of everything its graph depends on."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile.passes._compat import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Dim = tuple[int, int]
"""One size of a call: (which of its tensors, which dimension)."""


class CallKey(NamedTuple):
    """Equal for calls that one exported graph can serve.

    `owners`: for each tensor the argument it is in. `constants`: (argument, type, value) of every leaf that is no
    tensor. `autocast`: its dtype or None. `layouts`: for each tensor its strides, or None if it is contiguous or has
    fewer than two dimensions; an operator that gives a view of one layout copies another.
    """

    owners: tuple[str, ...]
    structure: TreeSpec
    kinds: tuple[tuple[int, torch.dtype, torch.device], ...]
    constants: tuple[tuple[str, type, Any], ...]
    autocast: torch.dtype | None
    sizes: tuple[tuple[int, ...], ...]
    layouts: tuple[tuple[int, ...] | None, ...]

    @property
    def family(self) -> tuple[Any, ...]:
        """Equal for calls that differ only in sizes and layouts."""
        return self[:5]


@dataclass(frozen=True)
class Call:
    """`arguments`: name in the signature -> value. `tensors`: the tensor leaves, in the order of `key.owners`."""

    arguments: dict[str, Any]
    tensors: tuple[Tensor, ...]
    key: CallKey

    @property
    def owners(self) -> tuple[str, ...]:
        """For each tensor the argument it is in."""
        return self.key.owners

    def rebuild(self, tensors: Iterable[Tensor]) -> dict[str, Any]:
        """The arguments with `tensors` in place of `self.tensors`."""
        fresh = iter(tensors)
        leaves, structure = tree_flatten(self.arguments)
        replaced = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        rebuilt: dict[str, Any] = tree_unflatten(replaced, structure)
        return rebuilt


def take_apart(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Bind a call to `signature`; raise TypeError as the call itself would."""
    bound = dict(signature.bind(*args, **kwargs).arguments)
    tensors: list[Tensor] = []
    owners: list[str] = []
    constants: list[tuple[str, type, Any]] = []
    for name, value in bound.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                owners.append(name)
            else:
                constants.append((name, type(leaf), leaf if _is_plain(leaf) else id(leaf)))
    device = tensors[0].device.type if tensors else "cpu"
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    key = CallKey(
        owners=tuple(owners),
        structure=tree_flatten(bound)[1],
        kinds=tuple((t.dim(), t.dtype, t.device) for t in tensors),
        constants=tuple(constants),
        autocast=torch.get_autocast_dtype(device) if casts else None,
        sizes=tuple(tuple(t.shape) for t in tensors),
        layouts=tuple(None if t.dim() < 2 or t.is_contiguous() else t.stride() for t in tensors),
    )
    return Call(bound, tuple(tensors), key)


def invoke(module: Callable[..., Any], signature: inspect.Signature, arguments: Mapping[str, Any]) -> Any:
    """Call `module` with `arguments` as `signature` takes them."""
    bound = inspect.BoundArguments(signature, OrderedDict(arguments))
    return module(*bound.args, **bound.kwargs)


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
        said.setdefault(name, []).append(repr(value) if kind in _PLAIN else f"a {kind.__name__}")
    return {**{name: ", ".join(parts) for name, parts in said.items()}, "autocast": str(key.autocast)}


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN)
