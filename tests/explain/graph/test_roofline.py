"""Lower bounds from published peak rates."""

from __future__ import annotations

import pytest
import torch

from fusion_compile.explain._graph.roofline import ROOFLINES, roofline

CPU = torch.device("cpu")


def test_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    h100 = roofline("H100", CPU)
    assert h100.microseconds(10**12, 0, torch.bfloat16) == pytest.approx(1e6 / 989.4)
    assert h100.microseconds(1, 3_350_000, torch.float32) == pytest.approx(1.0)
    assert h100.peak(torch.float32) == 66.9e12  # torch's default, "highest"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert h100.peak(torch.float32) == 494.7e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(ROOFLINES) == {"h100", "h200", "a100", "b200", "l40s", "rtx4090", "mi300x", "cpu"}
    with pytest.raises(ValueError, match=r"h99.*use one of h100, h200"):
        roofline("h99", CPU)
