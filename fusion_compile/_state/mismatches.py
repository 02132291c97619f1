"""Compare saved tensors with those that are wanted, and refuse with the list of differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_compile._state.other_codecs import codecs_differ

_MOST_SHOWN = 20
_JOINED_LATER = frozenset({"lost"})
"""Parts of transforms' state that checkpoints of version 0.1 lack, and that start at zero."""


def mismatches(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Any],
    describe: Callable[[str], str],
    *,
    complete: bool = True,
) -> list[str]:
    """One line for each difference: missing, unexpected, no tensor, another shape, values of another kind.

    `describe`: how a line calls the tensor of that name. `complete`: whether `given` must have exactly the names of
    `wanted`; otherwise only what both have is compared.
    """
    lines: list[str] = []
    if complete:
        lines += [f"missing {describe(n)}" for n in wanted if n not in given and not starts_at_zero(n)]
        lines += [f"unexpected {describe(n)}" for n in given if n not in wanted]
        if lines and (sentence := codecs_differ(wanted, given)):
            return [sentence]
    compared = [(n, difference(t, given[n])) for n, t in wanted.items() if n in given]
    return lines + [f"mismatched {describe(n)}: {what}" for n, what in compared if what]


def starts_at_zero(name: str) -> bool:
    """Whether a checkpoint may lack this tensor of a transform's state, which is zero then."""
    return not _JOINED_LATER.isdisjoint(name.split("."))


def difference(wanted: Tensor, given: Any) -> str:
    """Why `given` cannot be copied to where `wanted` is without becoming something else; empty if it can."""
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__} in the checkpoint, a tensor here"
    if given.shape != wanted.shape:
        return f"{list(given.shape)} in the checkpoint, {list(wanted.shape)} here"
    if given.layout is not torch.strided or given.is_meta:
        return f"a tensor without data of its own ({given.layout}, {given.device}) in the checkpoint"
    if given.dtype == wanted.dtype:
        return ""
    both = f"{given.dtype} in the checkpoint, {wanted.dtype} here"
    if _kind(given.dtype) != _kind(wanted.dtype):
        # Counts were floating-point numbers in version 0.1.
        counts = given.is_floating_point() and not wanted.ndim and _kind(wanted.dtype) == "integer"
        return "" if counts and _is_kept(given, wanted.dtype) else both
    return "" if _is_kept(given, wanted.dtype) else f"{both}, in which its values do not fit"


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else "integer"


def _is_kept(given: Tensor, dtype: torch.dtype) -> bool:
    """Whether no finite number becomes infinite in `dtype`, and no whole number another one."""
    converted = given.to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return bool((converted.isfinite() | ~given.isfinite()).all())
    return bool((converted.to(given.dtype) == given).all())


def refuse_mismatches(lines: Sequence[str], remedy: str) -> None:
    """Raise ValueError with the first of `lines`, each once, and `remedy`, if there are any lines."""
    if lines := [*dict.fromkeys(lines)]:
        shown = "\n  ".join(lines[:_MOST_SHOWN])
        more = f"\n  … and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else ""
        raise ValueError(
            f"the checkpoint is of another model or optimizer; nothing was loaded:\n  {shown}{more}\n{remedy}"
        )
