"""An fp32 number in two halves: every pattern comes back, and what is shown is its rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusion_compile._state.exact_bits import join, split

CHUNK = 1 << 22


def patterns(first: int, count: int = CHUNK, step: int = 1) -> torch.Tensor:
    """fp32 numbers whose bits are `first`, `first + step`, …"""
    bits = (np.arange(count, dtype=np.uint64) * step + first).astype(np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def check(x: torch.Tensor) -> None:
    shown, lost = split(x)
    back = join(shown, lost)
    number = ~x.isnan()
    same = x.view(torch.int32) == back.view(torch.int32)
    top = (x.view(torch.int32) & 0x7FFF8000) == 0x7FFF8000  # nan whose upper bits are ones
    assert bool((same | top).all()) and bool((back.isnan() == x.isnan()).all())
    assert bool((shown.isfinite() | ~x.to(torch.bfloat16).isfinite())[number].all())
    assert not bool(shown.isfinite()[~number].any())
    nearest = x.to(torch.bfloat16)
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert bool((shown.view(torch.int16) == nearest.view(torch.int16))[number & ~tie].all())


def test_a_sample_of_all_patterns_comes_back() -> None:
    check(patterns(0, 1 << 18, 16411))  # a prime step, through all exponents, signs and kinds


@pytest.mark.parametrize(
    "upper", [0x0000, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0xBF80, 0xFF7F, 0xFF80, 0xFFFF]
)
def test_all_lower_halves_of_the_patterns_where_something_happens(upper: int) -> None:
    check(patterns(upper << 16, 1 << 16))


def test_a_tie_is_rounded_away_from_zero() -> None:
    shown, lost = split(patterns(0x3F808000, 1))
    assert float(shown) == 1 + 2**-7 and int(lost) == -0x8000
    assert float(patterns(0x3F808000, 1).to(torch.bfloat16)) == 1.0


def test_what_somebody_wrote_stays_near_it_and_zero_is_no_nan() -> None:
    _, lost = split(torch.randn(4096))
    for value in (0.0, -0.0, 1.0, -3.5, 1e-38):
        written = torch.full((4096,), value, dtype=torch.bfloat16)
        far = (join(written, lost) - written.float()).abs()
        assert float(far.max()) <= max(abs(value) * 2**-8, 1e-38)


@pytest.mark.exhaustive
def test_all_patterns_come_back() -> None:
    """Bit by bit; what is shown of them is looked at in the samples. One minute."""
    for first in range(0, 1 << 32, CHUNK):
        x = patterns(first)
        bits = x.view(torch.int32)
        other = bits != join(*split(x)).view(torch.int32)
        if bool(other.any()):
            assert bool(((bits[other] & 0x7FFF8000) == 0x7FFF8000).all())
            assert bool(join(*split(x[other])).isnan().all())
