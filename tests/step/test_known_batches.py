"""A batch like one before it is not looked at again; any other one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_compile._step import batches
from fusion_compile._step.known_batches import KnownBatches

CPU = torch.device("cpu")


def pair() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)


@pytest.fixture
def known() -> KnownBatches:
    """Two kinds of batches were taken: a pair, and a pair of another size."""
    known = KnownBatches(CPU, fixed=False, compiled=True)
    for batch in (pair(), (torch.zeros(8, 2), torch.zeros(8))):
        assert known.taken(batch) == (batch, batches.signature(batch, CPU), False)
    return known


def test_a_batch_like_one_before_is_not_looked_at(known: KnownBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [batches.signature(batch, CPU) for batch in (pair(), (torch.zeros(8, 2), torch.zeros(8)))]
    for name in ("taken", "refuse_special", "signature"):
        monkeypatch.delattr(batches, name)
    for batch, signature in zip((pair(), (torch.ones(8, 2), torch.ones(8))), wanted, strict=True):
        taken, found, numpys = known.taken(batch)
        assert taken is batch and found == signature and not numpys


def same_twice() -> tuple[Tensor, Tensor]:
    one = torch.zeros(4, 2)
    return one, one


def made_in_inference_mode() -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return pair()


OTHERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "another size": lambda: (torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)),
    "another dtype": lambda: (torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)),
    "other strides": lambda: (torch.zeros(2, 4).t(), torch.zeros(4, dtype=torch.int64)),
    "one tensor twice": same_twice,
    "one more": lambda: (*pair(), torch.zeros(1)),
    "a number": lambda: (torch.zeros(4, 2), 3),
    "a list": lambda: (list(pair()),),
    "numpy": lambda: (np.zeros((4, 2), dtype=np.float32), np.zeros(4, dtype=np.int64)),
    "inference mode": made_in_inference_mode,
    "a buffer": lambda: (nn.Buffer(torch.zeros(4, 2)), torch.zeros(4, dtype=torch.int64)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_batch_is_looked_at(known: KnownBatches, kind: str) -> None:
    for _ in range(2):  # the second time one like it is known, or cannot be
        batch = OTHERS[kind]()
        taken, signature, numpys = known.taken(batch)
        assert signature == batches.signature(batches.taken(batch, CPU)[0], CPU)
        assert numpys == (kind == "numpy")
        assert not any(leaf.is_inference() for leaf in batches.tensors(taken))


REFUSED: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "learnable": (lambda: (torch.zeros(4, 2, requires_grad=True), pair()[1]), "requires a gradient"),
    "elsewhere": (lambda: (torch.zeros(4, 2, device="meta"), pair()[1]), "is on meta"),
    "sparse": (lambda: (torch.zeros(4, 2).to_sparse(), pair()[1]), "sparse"),
    "an object": (lambda: (torch.zeros(4, 2), object()), "batch"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_each_time(known: KnownBatches, kind: str) -> None:
    make, words = REFUSED[kind]
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=words):
            known.taken(make())


def test_no_more_than_a_few_kinds_are_remembered() -> None:
    known = KnownBatches(CPU, fixed=False, compiled=True)
    for size in range(1, 40):
        batch = (torch.zeros(size),)
        assert known.taken(batch)[1] == batches.signature(batch, CPU)
    assert len(known._known) == 8
