"""What a training program puts aside by `gc.freeze` is found all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("walks_frozen", [True, False])
def test_what_was_put_aside_from_the_collector(walks_frozen: bool) -> None:
    # In a process of its own: nothing takes single objects out of the frozen ones again.
    program = f"""
import gc, random, numpy as np
from torch import nn
from fusion_compile import _tracked
from fusion_compile._capture.sources.outside_iterators import OutsideIterators
from fusion_compile._torch_optim.naming import alive_modules
_tracked.walks_frozen = {walks_frozen}
iterator, module = iter([1, 2]), nn.Linear(1, 1)
gc.freeze()
later = iter([1, 2])
outside = OutsideIterators()
assert gc.get_freeze_count() and any(o is later for o in gc.get_objects()) is not {walks_frozen}
assert any(m is module for m in alive_modules()) is {walks_frozen}
assert id(random.random.__self__) in outside.randoms
np.random.rand()
assert np.random.rand.__self__ in outside.moved_numpy()
next(iterator), next(later)
moved = outside.moved()
assert any(i is later for i in moved) and any(i is iterator for i in moved) is {walks_frozen}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
