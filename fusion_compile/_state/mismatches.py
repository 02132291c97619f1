"""Compare names and shapes of saved tensors with those that are wanted, and refuse with the list of differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

_MOST_SHOWN = 20


def mismatches(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    describe: Callable[[str], str],
    *,
    complete: bool = True,
) -> list[str]:
    """One line for each difference: missing, unexpected, mismatched shape.

    `describe`: how a line calls the tensor of that name. `complete`: whether `given` must have exactly the names of
    `wanted`; otherwise only shapes are compared.
    """
    lines: list[str] = []
    if complete:
        lines += [f"missing {describe(n)}" for n in wanted if n not in given]
        lines += [f"unexpected {describe(n)}" for n in given if n not in wanted]
    return lines + [
        f"mismatched {describe(n)}: {list(given[n].shape)} in the checkpoint, {list(t.shape)} here"
        for n, t in wanted.items()
        if n in given and given[n].shape != t.shape
    ]


def refuse_mismatches(lines: Sequence[str], remedy: str) -> None:
    """Raise ValueError with the first of `lines` and `remedy`, if there are any lines."""
    if lines:
        shown = "\n  ".join(lines[:_MOST_SHOWN])
        more = f"\n  … and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else ""
        raise ValueError(
            f"the checkpoint is of another model or optimizer; nothing was loaded:\n  {shown}{more}\n{remedy}"
        )
