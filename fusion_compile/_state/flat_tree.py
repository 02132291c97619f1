"""Nested state <-> one flat dictionary. Paths are the field names: ``optimizer/spectral/base/0/mu/spectral/384x1536``.

Kept by hand rather than with torch's pytrees because the paths are a file format: they must not change with torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from fusion_compile._types import Tensors


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """``(path, tensor)`` for every tensor of a tree of NamedTuples, tuples and dictionaries, in a fixed order."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    children: Iterable[tuple[str, Any]]
    if isinstance(tree, dict):
        children = tree.items()
    elif hasattr(tree, "_fields"):
        children = zip(tree._fields, tree, strict=True)
    else:
        children = ((str(i), child) for i, child in enumerate(tree))
    for key, child in children:
        yield from flatten(child, f"{path}/{key}" if path else key)


def form(tree: Any, path: str = "") -> Any:
    """The tree with every tensor replaced by its path: what `unflatten` needs, and nothing that holds memory."""
    if isinstance(tree, Tensor):
        return path
    if isinstance(tree, dict):
        return {k: form(v, f"{path}/{k}" if path else k) for k, v in tree.items()}
    if hasattr(tree, "_fields"):
        return type(tree)(*(form(v, f"{path}/{k}" if path else k) for k, v in zip(tree._fields, tree, strict=True)))
    return tuple(form(v, f"{path}/{i}" if path else str(i)) for i, v in enumerate(tree))


def unflatten(form: Any, flat: Tensors) -> Any:
    """The tree of that `form` with the tensors of `flat` in place of their paths."""
    if isinstance(form, str):
        return flat[form]
    if isinstance(form, dict):
        return {k: unflatten(v, flat) for k, v in form.items()}
    if hasattr(form, "_fields"):
        return type(form)(*(unflatten(v, flat) for v in form))
    return tuple(unflatten(v, flat) for v in form)
