"""`scale_by_shape`: the factors, with and without blocks."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from tests.optim.one_tensor import Walk


def test_the_factor_is_that_of_the_shape() -> None:
    tall = torch.ones(8, 2, dtype=torch.float64)
    assert Walk(optim.scale_by_shape("original"), tall)(tall)[0, 0] == 2.0
    assert Walk(optim.scale_by_shape("original"), tall.T)(tall.T)[0, 0] == 1.0
    assert float(Walk(optim.scale_by_shape("match_rms_adamw"), tall.T)(tall.T)[0, 0]) == pytest.approx(0.2 * 8**0.5)
    assert torch.equal(Walk(optim.scale_by_shape("none"), tall)(tall), tall)


def test_an_option_that_is_not_known_lists_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'muon' is not known.*'original'"):
        optim.scale_by_shape("muon")
