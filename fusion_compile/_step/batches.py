"""Batches: their validation, their signature, and their split into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

Signature: TypeAlias = tuple[tuple[str, Any], ...]
"""``(path, (shape, dtype, stride))`` of every tensor and ``(path, value)`` of every None, bool or string."""


def leaves(tree: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """``(path, leaf)`` of nested tuples, lists and dictionaries."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from leaves(child, f"{path}[{key!r}]")
    elif isinstance(tree, tuple | list):
        for i, child in enumerate(tree):
            yield from leaves(child, f"{path}[{i}]")
    else:
        yield path, tree


def tensors(batch: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of a batch, in the order of `leaves`."""
    return [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor)]


def with_leaves(batch: Any, given: Iterable[Tensor]) -> Any:
    """`batch` with the tensors of `given`, in the order of `leaves`, in the places of its own; containers are new."""
    return _with_leaves(batch, iter(given))


def _with_leaves(tree: Any, given: Iterator[Tensor]) -> Any:
    if isinstance(tree, dict):
        return {key: _with_leaves(child, given) for key, child in tree.items()}
    if isinstance(tree, tuple | list):
        return _like(tree, [_with_leaves(child, given) for child in tree])
    return next(given) if isinstance(tree, Tensor) else tree


def signature(batch: tuple[Any, ...], device: torch.device) -> Signature:
    """The key of the program that fits `batch`. ValueError or TypeError for a batch that no program can take."""
    out: list[tuple[str, Any]] = []
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.device != device:
                raise ValueError(
                    f"{path} {list(leaf.shape)} is on {leaf.device}, but the model is on {device}. "
                    f"Move it before the step: tensor.to({str(device)!r})."
                )
            if leaf.requires_grad:
                raise ValueError(
                    f"{path} {list(leaf.shape)} requires a gradient, but the step differentiates the model's "
                    f"parameters only; pass tensor.detach()."
                )
            out.append((path, (tuple(leaf.shape), leaf.dtype, leaf.stride())))
        elif leaf is None or isinstance(leaf, bool | str):
            out.append((path, leaf))
        else:
            raise TypeError(
                f"{path} is a {type(leaf).__name__} ({leaf!r}); every new value would need another program. "
                f"Pass a tensor, torch.tensor({leaf!r}, device={str(device)!r})."
            )
    return tuple(out)


def check_same_kind(signature: Signature, compiled: Iterable[Signature]) -> None:
    """Raise ValueError if a batch differs in more than its shapes from those that programs were `compiled` for."""
    for first in compiled:
        new, old = _kinds(signature), _kinds(first)
        if new.keys() != old.keys():
            odd = sorted(new.keys() ^ old.keys())[0]
            how = "has no" if odd in old else "has an additional"
            raise ValueError(
                f"the batch {how} {odd}, unlike the first one; give the same parts, or compile another step."
            )
        for path, kind in new.items():
            if kind != old[path]:
                raise ValueError(
                    f"{path} is {kind}, but the step was compiled for {old[path]}; convert it, or compile another step."
                )
        return


def _kinds(signature: Signature) -> dict[str, str]:
    return {path: str(what[1]) if isinstance(what, tuple) else repr(what) for path, what in signature}


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with ``fn(tensor)`` in the place of each tensor; containers are new."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, dict):
        return {k: map_tensors(fn, v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return _like(tree, [map_tensors(fn, v) for v in tree])
    return tree


def _like(tree: Any, children: list[Any]) -> Any:
    """`children` in a list, tuple or NamedTuple like `tree`."""
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
