"""The states of all random number generators that a program may draw from: remembered, compared, put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class _Kept(NamedTuple):
    label: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    state: Any
    is_of_torch: bool


class RandomStates:
    """The generators of torch (the CPU's, and those of devices in use), of Python and of numpy, and a user's own.

    A device that is first used after this was made is not put back: its generator had no state to remember.

    Args:
        own: ``(label, generator)``: `torch.Generator`, `random.Random`, numpy's `Generator` or `RandomState`.
    """

    def __init__(self, own: Iterable[tuple[str, Any]] = ()) -> None:
        self._kept: list[_Kept] = []
        self._keep("torch's generator of the CPU", torch.get_rng_state, torch.set_rng_state)
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for i in range(torch.cuda.device_count()):
                generator = torch.cuda.default_generators[i]
                self._keep(f"torch's generator of cuda:{i}", generator.get_state, generator.set_state)
        if torch.backends.mps.is_available():
            self._keep("torch's generator of mps", torch.mps.get_rng_state, torch.mps.set_rng_state)
        self._keep("Python's generator (random)", random.getstate, random.setstate)
        self._keep("numpy's generator (numpy.random)", np.random.get_state, np.random.set_state)
        for label, generator in own:
            self._keep_own(label, generator)

    def moved(self) -> list[str]:
        """The labels of the generators that drew, or were seeded, since."""
        return [kept.label for kept in self._kept if not _is_same(kept.get(), kept.state)]

    def moved_outside_torch(self) -> bool:
        """Whether one moved whose draws are not operators of torch."""
        return any(not kept.is_of_torch and not _is_same(kept.get(), kept.state) for kept in self._kept)

    def restore(self) -> None:
        """Put every state back."""
        for kept in self._kept:
            kept.set(kept.state)

    def _keep(self, label: str, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        state = get()
        self._kept.append(_Kept(label, get, put, state, isinstance(state, Tensor)))

    def _keep_own(self, label: str, generator: Any) -> None:
        if isinstance(generator, torch.Generator):
            self._keep(label, generator.get_state, generator.set_state)
        elif isinstance(generator, random.SystemRandom):
            return  # the operating system's, which has no state
        elif isinstance(generator, random.Random):
            self._keep(label, lambda: random.Random.getstate(generator), lambda s: random.Random.setstate(generator, s))
        elif isinstance(generator, np.random.RandomState):
            self._keep(label, generator.get_state, generator.set_state)
        elif isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            self._keep(label, lambda: bits.state, lambda s: setattr(bits, "state", s))


def _is_same(a: Any, b: Any) -> bool:
    """Equality of states: nested tuples and dictionaries of numbers, arrays and tensors."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return bool(a == b)
