"""The ordinary ways to train and to sample, and fair timing of both ways by turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def seconds(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """How long `work` takes until the device has done it, and its result."""
    _wait_for(device)
    before = time.perf_counter()
    result = work()
    _wait_for(device)
    return time.perf_counter() - before, result


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Race(Generic[T]):
    """Times two ways to do the same by turns; who goes first alternates, so that a noisy machine is noisy for both."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ours: list[float] = []
        self._theirs: list[float] = []

    def round(self, ours: Callable[[], T], theirs: Callable[[], T]) -> tuple[T, T]:
        """Each once; the results of both."""
        if len(self._ours) % 2:
            b, theirs_result = seconds(theirs, self._device)
            a, ours_result = seconds(ours, self._device)
        else:
            a, ours_result = seconds(ours, self._device)
            b, theirs_result = seconds(theirs, self._device)
        self._ours.append(a)
        self._theirs.append(b)
        return ours_result, theirs_result

    def milliseconds(self, per: int = 1) -> tuple[float, float]:
        """Medians of ours and theirs, divided by `per`."""
        return 1000 * statistics.median(self._ours) / per, 1000 * statistics.median(self._theirs) / per


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """`model` under ``torch.compile`` in the mode that ours runs in; itself if that is ``"eager"``."""
    if mode == "eager":
        return model
    return cast(nn.Module, torch.compile(model, mode=None if mode == "default" else mode))


def ordinary_step(model: nn.Module, loss_fn: Loss, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A training step as it is usually written: the model compiled, the loss and a fused AdamW around it."""
    fast = compiled(model, mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(fast, x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def euler_loop(model: nn.Module, schedule: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Rectified flow by Euler steps with `model` called as it is, labels and all, at every step of `schedule`."""
    times = [*schedule.double().tolist(), 0.0]

    @torch.no_grad()
    def sample(noise: Tensor, y: Tensor) -> Tensor:
        x = noise
        for t, t_next in pairwise(times):
            x = x - (t - t_next) * model(x, x.new_full((len(x),), t), y)
        return x

    return sample


@torch.no_grad()
def largest_differences(
    sampler: nn.Module, models: Sequence[nn.Module], schedule: Tensor, noise: Tensor, y: Tensor
) -> list[float]:
    """For each of `models` the largest difference from what `sampler` predicts, on the path from noise to data."""
    found = [0.0 for _ in models]
    x = noise
    for t, t_next in pairwise([*schedule.double().tolist(), 0.0]):
        at = x.new_full((len(x),), t)
        velocity = sampler(x, at, y)
        found = [max(most, float((velocity - m(x, at, y)).abs().max())) for most, m in zip(found, models, strict=True)]
        x = x - (t - t_next) * velocity
    return found
