"""A denoiser is analysed on tensors without data, at the prices of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.conditioning import Batched
from fusion_compile._sampler.without_weights.analysis import analyse_denoiser, analyse_without_data
from tests.small_denoiser import X, Y, denoiser

ARGS = (X, torch.ones(2), Y)


def test_weights_are_counted_by_when_they_are_read_last() -> None:
    analysis = analyse_denoiser(denoiser(), ARGS, {}, n_steps=3)
    assert analysis.weights == {
        "const": (0, 0),
        "step": (24, 96),
        "request": (40, 160),
        "step_request": (72, 288),
        "live": (20, 80),
        "unread": (0, 0),
    }
    assert (analysis.report.mode, analysis.report.rows, analysis.report.n_steps) == ("not compiled", "exact", 3)
    assert "    step_request               72 parameters ( 46.2%)," in str(analysis)


def test_options_reach_the_report() -> None:
    analysis = analyse_denoiser(
        denoiser(), ARGS, {}, n_steps=3, conditioning=Batched(), roles={"y": "live"}, byte_budget=0
    )
    assert analysis.report.rows == "batched" and "y=live" in analysis.report.roles
    assert analysis.report.byte_budget == "0.00 MiB"
    assert analysis.report.table_bytes == 3 * 64  # a body needs its timestep, which takes 64 bytes a row
    with pytest.raises(ValueError, match="n_steps=0; a schedule has at least one step"):
        analyse_denoiser(denoiser(), ARGS, {}, n_steps=0)


def test_a_model_is_built_on_meta_tensors_or_on_fake_ones_if_it_refuses_these(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = denoiser()

        def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
            print(f"on {x.device.type}")  # what is kept in Python is put back after a trace
            if x.is_meta:
                raise ValueError("no meta tensors here")
            out: Tensor = self.inner(x, timestep, y)
            return out

    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        return Picky(), (torch.randn(2, 4), torch.ones(2), torch.zeros(2, dtype=torch.int64)), {}

    report = analyse_without_data(build, n_steps=2).report
    said = capsys.readouterr().out
    assert report.inputs[0] == "x float32[2, 4] cpu" and "on meta" in said and "on cpu" in said
