"""Runs of a flat bank: which parameters they hold, and where their gradients are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._state.banks import Layout, build_layout
from fusion_compile._state.routing import Route
from fusion_compile._torch_optim import runs
from fusion_compile._torch_optim.parameter_group import holder
from fusion_compile._torch_optim.piecewise import COLUMNS
from fusion_compile._torch_optim.runs import Runs, large_first, where_it_lies
from fusion_compile.optim._transform import ELEMENTWISE, Place

SHAPES = {"a": (5,), "large": (8, 16), "b": (3, 7), "odd": (9, 17), "c": (16,)}


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr(runs, "LARGE", 4 * 128)
    monkeypatch.setattr(runs, "_TOGETHER", 4 * 48)
    members = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    routes = [Route(name, shape, ELEMENTWISE, "a test") for name, shape in SHAPES.items()]
    return build_layout(holder(members), large_first(routes, members), alignment=COLUMNS)


def test_a_large_parameter_is_a_run_and_small_ones_are_together(layout: Layout) -> None:
    found = {run.names: run for run in Runs(layout).of(())}
    assert [*found] == [("large",), ("odd",), ("a", "b"), ("c",)], "odd is no multiple of 16, and is copied"
    assert [run.gradient is None for run in found.values()] == [True, False, False, False]
    assert [run.rows for run in found.values()] == [8, 10, 3, 1]


def test_runs_cover_each_entry_once_and_leave_out_what_is_missing(layout: Layout) -> None:
    whole, some = Runs(layout).of(()), Runs(layout).of({"a", "large"})
    (bank,) = layout.banks
    entries = sorted(i for run in whole for i in range(run.first, run.last))
    assert entries == [*range(bank.length)]
    assert sorted(name for run in some for name in run.names) == ["b", "c", "odd"]


def test_small_gradients_lie_as_the_bank_does(layout: Layout) -> None:
    cut = Runs(layout)
    run = next(run for run in cut.of(()) if run.names == ("a", "b"))
    assert run.gradient is not None and run.gradient.shape == (3, COLUMNS)
    run.gradient.fill_(9.0)
    for place, value in zip(run.places, (1.0, 2.0), strict=True):
        place.fill_(value)
    for gap in run.padding:
        gap.zero_()
    assert run.gradient.flatten().tolist() == [1.0] * 5 + [0.0] * 11 + [2.0] * 21 + [0.0] * 11
    assert [memory.numel() for memory in cut.memory] == [160], "all runs share one memory"


def conjugated(given: Tensor) -> Tensor:
    """The same numbers as a view of a complex tensor, whose sign is in a bit of the view."""
    return torch.complex(torch.zeros_like(given), -given).conj().imag


def test_a_gradient_is_read_where_it_lies_or_brought_into_order() -> None:
    given, place = torch.randn(8, 16), Place("large", (8, 16), 0)
    assert where_it_lies(given, place).data_ptr() == given.data_ptr()
    turned = given.t().contiguous().t()
    for other in (turned, conjugated(given), given.expand(1, 8, 16)[0], nn.Parameter(given)):
        assert torch.equal(where_it_lies(other.detach(), place).flatten(), given.flatten())
    assert conjugated(given).is_neg() and not turned.is_contiguous()
    image = torch.randn(2, 4, 4, 4).to(memory_format=torch.channels_last)
    read = where_it_lies(image, Place("image", (2, 4, 4, 4), 0, (0, 2, 3, 1)))
    assert read.data_ptr() == image.data_ptr()
    assert torch.equal(read.flatten(), image.permute(0, 2, 3, 1).flatten())
