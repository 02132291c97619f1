"""A parameter of which this process keeps no number between steps, because others keep them.

It keeps its identity, shape and dtype, and refuses to be read or written with a sentence. What reads past Python finds
not-a-numbers: the memory behind it is one of them, repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PROPERTIES = (
    "_version",
    "_backward_hooks",
    "_post_accumulate_grad_hooks",
    "device",
    "dtype",
    "grad",
    "grad_fn",
    "is_cpu",
    "is_cuda",
    "is_leaf",
    "is_meta",
    "is_mkldnn",
    "is_mps",
    "is_nested",
    "is_quantized",
    "is_sparse",
    "is_sparse_csr",
    "itemsize",
    "layout",
    "name",
    "names",
    "nbytes",
    "ndim",
    "output_nr",
    "requires_grad",
    "retains_grad",
    "shape",
)
_METHODS = (
    "__hash__",
    "__len__",
    "data_ptr",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "is_set_to",
    "is_shared",
    "ndimension",
    "nelement",
    "numel",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "requires_grad_",
    "size",
    "storage_offset",
    "stride",
    "untyped_storage",
)


def _asked() -> set[Any]:
    """What may be asked of a tensor without reading its numbers."""
    found: set[Any] = {getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)}
    found |= {Tensor.grad.__set__, Tensor.requires_grad.__set__}  # type: ignore[union-attr, attr-defined]
    found |= {getattr(Tensor, name) for name in _METHODS}
    return found | {torch.is_floating_point, torch.is_complex, torch.numel}


_ASKED = _asked()


class Elsewhere(nn.Parameter):
    """A parameter whose numbers are elsewhere; see `hide`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        name, shape = next(((p._elsewhere[0], [*p.shape]) for p in _found((args, kwargs or {}))), ("a parameter", []))
        raise RuntimeError(
            f"{name} {shape} was read or written between steps (by {getattr(func, '__name__', func)}), and with "
            f"shard='full' each rank keeps only its own matrices then. Do it inside of `with step.gathered():`, which "
            f"all ranks enter together, or take step.state_dict(); step.save() and step.load() need nothing."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter of {[*self.shape]} {self.dtype}, whose numbers each rank has in part (step.gathered())"


def _found(given: Any) -> Iterator[Any]:
    if isinstance(given, Elsewhere):
        yield given
    elif isinstance(given, list | tuple):
        for each in given:
            yield from _found(each)
    elif isinstance(given, dict):
        yield from _found([*given.values()])


def nothing_like(place: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `place`, in the memory of one not-a-number."""
    return torch.full((), float("nan"), dtype=place.dtype, device=place.device).expand(place.shape)


def hide(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """From now on the parameters, by name, are `Elsewhere`. They stay the objects that they are."""
    for name, parameter in parameters:
        parameter._elsewhere = name, type(parameter)  # type: ignore[attr-defined]
        parameter.__class__ = Elsewhere


def show(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """The inverse of `hide`."""
    for _, parameter in parameters:
        _, parameter.__class__ = parameter._elsewhere  # type: ignore[attr-defined]
        del parameter._elsewhere  # type: ignore[attr-defined]
