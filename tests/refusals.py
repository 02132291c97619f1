"""What every refusal of a training step has to show: a sentence, no changed bit, and a step that still works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import fusion_compile as fc
from tests.small_models import batches, bits, differing


@contextmanager
def refused(step: fc.TrainingStep, error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises `error` with all of `words` in its message, and no bit of the step's state changes."""
    before = bits(step)
    with pytest.raises(error) as caught:
        yield
    missing = [w for w in words if w not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert differing(before, bits(step)) == []


def works(step: fc.TrainingStep) -> bool:
    """Whether a good batch is taken and moves the weights."""
    before = bits(step)
    step(*batches(1)[0])
    return any(n.startswith("module/") for n in differing(before, bits(step)))
