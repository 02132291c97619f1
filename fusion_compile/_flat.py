"""Nested state <-> one flat dictionary. Paths are the field names: ``optimizer/spectral/base/0/mu/spectral/384x1536``.

Kept by hand rather than with torch's pytrees because the paths are a file format: they must not change with torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fusion_compile._types import Tensors


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """``(path, tensor)`` for every tensor of a tree of NamedTuples, tuples and dictionaries, in a fixed order."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    if isinstance(tree, dict):
        children = tree.items()
    elif hasattr(tree, "_fields"):
        children = zip(tree._fields, tree, strict=True)
    else:
        children = ((str(i), child) for i, child in enumerate(tree))
    for key, child in children:
        yield from flatten(child, f"{path}/{key}" if path else key)


def unflatten(template: Any, flat: Tensors, path: str = "") -> Any:
    """The tree of `template`'s form whose tensors are those of `flat`."""
    if isinstance(template, Tensor):
        return flat[path]
    if isinstance(template, dict):
        return {k: unflatten(v, flat, f"{path}/{k}" if path else k) for k, v in template.items()}
    if hasattr(template, "_fields"):
        return type(template)(
            *(
                unflatten(v, flat, f"{path}/{k}" if path else k)
                for k, v in zip(template._fields, template, strict=True)
            )
        )
    return tuple(unflatten(v, flat, f"{path}/{i}" if path else str(i)) for i, v in enumerate(template))
