"""From this rank's gradient, loss, metrics and buffers to those of all ranks: where a step communicates.

A rank's mean counts by the entries of its batch, or by the count that ``weigh_by=`` names. What comes out is the mean
over the batches of all ranks laid together, as with ``accumulate=``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._ranks.division import Division
from fusion_compile._ranks.packed import of_every_rank
from fusion_compile._step import batches
from fusion_compile._step.micro_batches import leading_size
from fusion_compile._types import Tensors
from fusion_compile.optim.clip_by_global_norm import global_norm

Before = Callable[["Local"], None]
"""Called with what a rank has before it communicates, where Python runs at every step."""


class Local(NamedTuple):
    """What one rank has. `gradients`: in the pieces in which they travel. `weight`: by which its means count, 0-dim."""

    gradients: Tensors
    loss: Tensor
    metrics: Tensors
    buffers: Tensors
    weight: Tensor

    def lines(self) -> tuple[str, ...]:
        """One line for each thing that travels: the same on every rank."""
        named = {**self.gradients, "loss": self.loss, **self.metrics}
        kept = {f"buffer {name}": buffer for name, buffer in self.buffers.items()}
        return tuple(f"{name} {[*t.shape]} {t.dtype}" for name, t in {**named, **kept}.items())


class OfAll(NamedTuple):
    """What all ranks have. `gradients`: banks of what this rank owns. `whole`: the whole banks, where they are kept."""

    gradients: Tensors
    norm: Tensor
    loss: Tensor
    metrics: Tensors
    buffers: Tensors
    whole: Tensors


def weight_of(batch: tuple[Any, ...], metrics: Tensors, weigh_by: str | None, like: Tensor) -> Tensor:
    """By how much this rank's means count, 0-dim fp64. `metrics`: of its whole batch."""
    if weigh_by is None:
        has_axes = any(t.ndim for t in batches.tensors(batch))
        return torch.ones((), dtype=torch.float64, device=like.device) * (leading_size(batch) if has_axes else 1)
    count = metrics.get(weigh_by)
    if not isinstance(count, Tensor) or count.ndim:
        got = f"{list(count.shape)}" if isinstance(count, Tensor) else f"only {sorted(metrics) or 'the loss'}"
        raise ValueError(
            f"weigh_by={weigh_by!r} names a metric of the loss, a 0-dim count, and the loss returned {got}; return "
            f"(loss, {{{weigh_by!r}: mask.sum()}})."
        )
    return count.to(torch.float64)


def reduced(division: Division, local: Local, weigh_by: str | None, *, whole: bool) -> OfAll:
    """What all ranks have. `whole`: whether the whole gradient is wanted on every rank."""
    with _compat.region("communication"):
        weighed = {key: piece * local.weight.to(piece.dtype) for key, piece in local.gradients.items()}
        sums = division.summed(weighed, everywhere=whole)
        own = division.own(sums) if whole else sums
        rows = of_every_rank(
            {
                "weight": local.weight,
                "squares": division.share_of_squares(own),
                "loss": local.loss,
                **{f"metric {name}": metric for name, metric in local.metrics.items()},
            },
            division.ranks.everyone,
        )
        every = rows["weight"].sum()
        norm = (rows["squares"].sum().sqrt() / every).to(next(iter(own.values())).dtype)
        metrics = {
            n: _mean(rows[f"metric {n}"], rows["weight"], m, division, n == weigh_by) for n, m in local.metrics.items()
        }
        loss = ((rows["loss"] * rows["weight"]).sum() / every).to(local.loss.dtype)
        gradients = {key: bank / every.to(bank.dtype) for key, bank in own.items()}
        kept = {key: bank / every.to(bank.dtype) for key, bank in sums.items()} if whole else {}
        return OfAll(gradients, norm, loss, metrics, averaged_buffers(division, local.buffers), kept)


def _mean(rows: Tensor, weights: Tensor, metric: Tensor, division: Division, counts: bool) -> Tensor:
    if counts:
        return rows.sum(0).to(metric.dtype)
    mean = (rows * weights.view(-1, *[1] * metric.ndim)).sum(0) / weights.sum()
    wide = metric.is_floating_point() or metric.is_complex()
    return mean.to(metric.dtype if wide else division.whole.state_dtype)


def averaged_buffers(division: Division, buffers: Tensors) -> Tensors:
    """Floating-point buffers as means over all ranks, in one collective; others as they are."""
    floating = {n: b for n, b in buffers.items() if b.is_floating_point()}
    if not floating:
        return buffers
    dtype = division.whole.state_dtype
    flat = torch.cat([b.to(dtype).reshape(-1) for b in floating.values()])
    mean = division.mean(flat)
    parts = torch.split(mean, [b.numel() for b in floating.values()])
    return buffers | {n: p.view(b.shape).to(b.dtype) for (n, b), p in zip(floating.items(), parts, strict=True)}


def refuse_buffers(buffers: dict[str, Tensor], changed: Sequence[str]) -> None:
    """Raise ValueError for a changed buffer that has no mean over ranks. A counter of one entry each rank counts alike.

    `buffers`: the model's, by name.
    """
    for name in changed:
        buffer = buffers[name]
        if not buffer.is_floating_point() and buffer.numel() > 1:
            raise ValueError(
                f"the loss changes the buffer {name} {list(buffer.shape)} {buffer.dtype}, which each rank would change "
                f"by its own batch, and which has no mean. Keep it in floating point, which is averaged over ranks, or "
                f"return what it counts as a metric."
            )


def norm_of_all(division: Division | None, updates: Tensors, taken: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The norm of what was added to the weights, and whether every rank takes the step.

    `taken`: whether this rank does; None where no step is skipped. Where state is divided, ranks see other numbers.
    """
    if division is None or not division.divided:
        return global_norm(updates), taken
    with _compat.region("communication"):
        share = division.share_of_squares(updates)
        yes = torch.ones_like(share) if taken is None else taken.to(share.dtype)
        rows = of_every_rank({"squares": share, "taken": yes}, division.ranks.everyone)
        norm = rows["squares"].sum().sqrt().to(next(iter(updates.values())).dtype)
        return norm, None if taken is None else (rows["taken"] > 0).all()
