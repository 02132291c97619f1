"""A model that cannot be exported is refused with the line of its source and the likely reason."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._sampler.graph.export import trace_denoiser


def _refused(model: nn.Module, *args: Any) -> str:
    with pytest.raises(ValueError) as refusal:
        trace_denoiser(model, take_apart(inspect.signature(model.forward), args, {}))
    return str(refusal.value)


def test_a_model_that_reads_a_tensor_is_refused_with_the_line_that_reads() -> None:
    class Lists(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            lengths = n.tolist()
            return x * len(set(lengths))

    class Branches(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            if n.sum() > 1:
                return x
            return x * 2

    for model, line, source in ((Lists(), 2, "lengths = n.tolist()"), (Branches(), 2, "if n.sum() > 1:")):
        first = inspect.getsourcelines(type(model).forward)[1]
        said = _refused(model, torch.randn(2), torch.tensor([1, 2]))
        assert f"{type(model).__name__} could not be exported for [(2,), (2,)]" in said
        assert f"are read at {__file__}:{first + line - 1} (`{source}`)" in said


def test_a_call_that_the_model_refuses_is_told_from_one_that_export_refuses() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 3:
                raise RuntimeError("three channels are wanted")
            return x

    class Holds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.from_numpy(x.numpy())

    line = inspect.getsourcelines(Picky.forward)[1] + 2
    said = _refused(Picky(), torch.randn(2, 4))
    assert (
        f"RuntimeError at {__file__}:{line} (" in said and "three channels are wanted. The model itself refuses" in said
    )
    assert "(`return x + torch.from_numpy(x.numpy())`)" in _refused(Holds(), torch.randn(2, 4))
