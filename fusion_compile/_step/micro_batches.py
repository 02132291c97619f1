"""`accumulate`: the parts of a batch, and how much each part counts in the mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fusion_compile._step import batches
from fusion_compile._step.containers import map_tensors
from fusion_compile._types import Tensors

_Metrics: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]


class MicroBatch(NamedTuple):
    """A part of a batch. `size`: its entries along the batch's leading axis."""

    batch: tuple[Any, ...]
    size: int


def leading_size(batch: tuple[Any, ...]) -> int:
    """The leading size that most tensors of the batch share; of several such sizes that of the first tensor.

    Raises ValueError where no tensor has an axis to cut.
    """
    sizes = [t.shape[0] for t in batches.tensors(batch) if t.ndim]
    if not sizes:
        raise ValueError("accumulate cuts the batch along its leading axis, and no tensor of the batch has one.")
    return max(sizes, key=sizes.count)


def uncut(batch: tuple[Any, ...]) -> str:
    """Which tensors every micro-batch gets whole, though they have a leading axis (a lookup table); empty if none."""
    size = leading_size(batch)
    whole = [
        f"{path} {list(leaf.shape)}"
        for path, leaf in batches.leaves(batch)
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] != size
    ]
    if not whole:
        return ""
    return (
        f"accumulate cuts what shares the batch's leading size, {size}; {', '.join(whole[:3])} goes whole into every "
        f"micro-batch."
    )


def micro_batches(batch: tuple[Any, ...], accumulate: int) -> list[MicroBatch]:
    """`accumulate` parts as equal as can be, the larger ones first; fewer where the batch has fewer entries.

    What shares the batch's leading size is cut; everything else is in every part.
    """
    if accumulate == 1:
        return [MicroBatch(batch, 1)]
    whole = leading_size(batch)
    count = max(1, min(accumulate, whole))
    parts, start = [], 0
    for i in range(count):
        size = whole // count + (i < whole % count)
        parts.append(MicroBatch(_cut(batch, start, size, whole), size))
        start += size
    return parts


def _cut(batch: tuple[Any, ...], start: int, size: int, whole: int) -> tuple[Any, ...]:
    def one(tensor: Tensor) -> Tensor:
        return tensor[start : start + size] if tensor.ndim and tensor.shape[0] == whole else tensor

    found: tuple[Any, ...] = map_tensors(one, batch)
    return found


@dataclass(frozen=True)
class Shares:
    """How much each micro-batch counts in the mean of losses, gradients and metrics.

    Attributes:
        sizes: Entries of each part. Equal parts count alike, others by their size, so that the mean of means is the
            mean over the whole batch.
        weigh_by: Name of a metric that the loss returns, a count (of tokens, of unmasked pixels); None: `sizes`.
    """

    sizes: tuple[int, ...]
    weigh_by: str | None = None

    @classmethod
    def of(cls, parts: Sequence[MicroBatch], weigh_by: str | None) -> Shares:
        """Of the `parts` of one batch."""
        return cls(tuple(part.size for part in parts), weigh_by)

    def weight(self, i: int, metrics: Tensors) -> Tensor | int:
        """By what the loss of part `i` is multiplied before its backward. `metrics`: what it returned.

        Raises ValueError where it returned no such count.
        """
        if len(self.sizes) == 1 or (self.weigh_by is None and len(set(self.sizes)) == 1):
            return 1
        if self.weigh_by is None:
            return self.sizes[i]
        count = metrics.get(self.weigh_by)
        if not isinstance(count, Tensor) or count.ndim:
            got = f"{list(count.shape)}" if isinstance(count, Tensor) else f"only {sorted(metrics) or 'the loss'}"
            raise ValueError(
                f"weigh_by={self.weigh_by!r} names a metric of the loss, a 0-dim count, and the loss returned {got}; "
                f"return (loss, {{{self.weigh_by!r}: mask.sum()}})."
            )
        return count.detach()

    def total(self, weights: Sequence[Tensor | int]) -> Tensor | int:
        """By what the sum over all parts is divided."""
        total: Tensor | int = weights[0]
        for weight in weights[1:]:
            total = total + weight
        return total

    def mean(self, found: Sequence[Tensors], weights: Sequence[Tensor | int], dtype: torch.dtype) -> Tensors:
        """The means of the parts' metrics; the count itself is summed. Integers and booleans become `dtype`."""
        if len(found) == 1:
            return found[0]
        total = self.total(weights)
        return {name: self._mean_of(name, found, weights, total, dtype) for name in found[0]}

    def _mean_of(
        self,
        name: str,
        found: Sequence[Tensors],
        weights: Sequence[Tensor | int],
        total: Tensor | int,
        dtype: torch.dtype,
    ) -> Tensor:
        values = [metrics[name] for metrics in found]
        if odd := [v for v in values if v.shape != values[0].shape]:
            raise ValueError(
                f"the metric {name!r} is {list(values[0].shape)} in the first micro-batch and {list(odd[0].shape)} in "
                f"another, so it has no mean. Return a number, or give a batch of a multiple of accumulate."
            )
        if name == self.weigh_by:
            return self._sum(values)
        wide = [v if v.is_floating_point() or v.is_complex() else v.to(dtype) for v in values]
        return (
            self._sum([v * w if isinstance(w, Tensor) or w != 1 else v for v, w in zip(wide, weights, strict=True)])
            / total
        )

    def metrics(self, found: _Metrics, state: torch.dtype) -> _Metrics:
        """Shapes and dtypes of the means of metrics that a loss returns; those of numbers are in the state dtype."""

        def mean(name: str, dtype: torch.dtype) -> torch.dtype:
            averaged = len(self.sizes) > 1 and name != self.weigh_by
            return state if averaged and not (dtype.is_floating_point or dtype.is_complex) else dtype

        return {name: (shape, mean(name, dtype)) for name, (shape, dtype) in found.items()}

    def known_total(self) -> int | None:
        """`total` before any part has run; None where it is what the loss will count."""
        if self.weigh_by is not None and len(self.sizes) > 1:
            return None
        return len(self.sizes) if len(set(self.sizes)) == 1 else sum(self.sizes)

    @staticmethod
    def _sum(values: Sequence[Tensor]) -> Tensor:
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total


def times(value: Tensor, weight: Tensor | int) -> Tensor:
    """`value` times the weight of its part; itself for 1."""
    return value * weight if isinstance(weight, Tensor) or weight != 1 else value
