"""The random state is checked before it is put back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion_compile._state.random_state import RandomState

CPU = torch.device("cpu")


def test_numbers_drawn_after_it_was_put_back_are_those_that_would_have_come() -> None:
    saved = RandomState.now(CPU)
    wanted = torch.randn(4)
    torch.manual_seed(9)
    checked = RandomState(saved, CPU)
    other = torch.get_rng_state()
    assert not torch.equal(other, saved["cpu"])  # checking it has put nothing back
    checked.put()
    assert torch.equal(torch.randn(4), wanted)


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda s: s[:-1],
        lambda s: s.float(),
        lambda s: torch.full_like(s, 255),
        lambda s: s[:0],
    ],
)
def test_bytes_that_are_no_state_are_refused_and_touch_nothing(spoiled: object) -> None:
    assert callable(spoiled)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"rng cpu \[\d+\] torch\.\w+ is no state of torch's generator .*nothing was"):
        RandomState({"cpu": spoiled(before)}, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("saved", [{}, {"cuda": torch.zeros(16, dtype=torch.uint8)}])
def test_what_is_lacking_and_what_is_of_another_device_stays(saved: dict[str, Tensor]) -> None:
    before = torch.get_rng_state()
    RandomState(saved, CPU).put()
    assert torch.equal(torch.get_rng_state(), before)
