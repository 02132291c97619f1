"""What a model's Python code reads from tensors: recorded, given to a trace, and read again from a graph."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._sampler.graph.export import DenoiserGraph, record_reads, trace_denoiser
from fusion_compile._sampler.graph.host_reads import Recording

X, N = torch.ones(2, 3), torch.tensor([1.0, 2.0])


class ReadsAll(nn.Module):
    """Every way in which Python code gets at numbers in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Buffer(torch.ones(3))

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        scale = n.sum().item() + len({*n.tolist()}) + int(n[0]) + float(n[1]) + [5, 6, 7][n[0].long()]
        if self.mask.eq(1).all() and not torch.equal(n[:1], n[1:]) and 2.0 in n:
            scale += float(n.numpy().max()) + float(np.asarray(n)[0])
        return x * scale


def traced(model: nn.Module, *args: Any) -> DenoiserGraph:
    call = take_apart(inspect.signature(model.forward), args, {})
    return trace_denoiser(model, call, record_reads(model, call))


def test_reads_are_recorded_with_line_and_value() -> None:
    def work() -> None:
        _ = N.tolist(), bool(N[0] > 0), N[1].item()

    with Recording() as recording:
        work()
    assert [read.value for read in recording.reads] == [1.0, 2.0, True, 2.0]
    line = inspect.getsourcelines(work)[1] + 1
    assert {read.where for read in recording.reads} == {f"{__file__}:{line}"}


def test_a_trace_takes_the_values_and_a_graph_reads_them_again() -> None:
    model = ReadsAll().eval()
    graph = traced(model, X, N)
    assert graph.reads is not None and "n" in graph.reads.inputs and "x" not in graph.reads.inputs
    weights = {name: graph.weights[name] for name in graph.reads.inputs if name in graph.weights}
    assert [w.tolist() for w in weights.values()] == [[1.0, 1.0, 1.0]]
    assert graph.reads.holds({**weights, "n": N.clone()})
    assert not graph.reads.holds({**weights, "n": N + 1})
    assert not graph.reads.holds({**{name: 2 * w for name, w in weights.items()}, "n": N})
    inputs = {**graph.weights, "x": X, "n": N}
    placeholders = graph.graph_module.graph.find_nodes(op="placeholder")
    (out,) = graph.graph_module(*(inputs[str(p.target)] for p in placeholders))
    assert torch.equal(out, model(X, N))


def test_a_trace_that_reads_less_than_a_real_run_finds_its_own() -> None:
    class Careful(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and n.min().item() < 0:
                raise ValueError("negative")
            return x * (2 if n.max().item() > 1 else 3)

    graph = traced(Careful(), X, N)
    assert graph.reads is not None and [read.value for _, read in graph.reads.read_nodes()] == [2.0]


class Sized(nn.Module):
    """QwenImage-2.1 lays out text and image by a mask, and its Python code compares lengths."""

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        chosen = torch.repeat_interleave(n > 1, (n > 1).long() + 1)
        if len(chosen.nonzero()) + len(chosen.nonzero(as_tuple=True)[0]) != 2 * int(chosen.sum()):
            raise ValueError("the lengths disagree")
        laid = x.new_zeros(len(chosen), 3)
        laid[chosen] = x[n > 1].repeat_interleave(2, dim=0)
        return laid + sum(chosen.tolist())


def test_sizes_that_data_decide_are_read_where_the_code_needs_them() -> None:
    call = take_apart(inspect.signature(Sized().forward), (X, N), {})
    with pytest.raises(ValueError, match="could not be exported"):
        trace_denoiser(Sized(), call, record_reads(Sized(), call))
    graph = trace_denoiser(Sized(), call, record_reads(Sized(), call, sizes=True))
    placeholders = graph.graph_module.graph.find_nodes(op="placeholder")
    inputs = {**graph.weights, "x": X, "n": N}
    (out,) = graph.graph_module(*(inputs[str(p.target)] for p in placeholders))
    assert torch.equal(out, Sized()(X, N)) and out.shape == (3, 3)
    assert graph.reads is not None
    weights = {name: t for name, t in graph.weights.items() if name in graph.reads.inputs}
    assert graph.reads.holds({**weights, "n": 2 * N - 1}) and not graph.reads.holds({**weights, "n": N.flip(0)})


def test_a_real_run_leaves_the_call_as_it_is() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            return x.add_(1) if n.sum() > 0 else x

    x = torch.zeros(2, 3)
    call = take_apart(inspect.signature(Writes().forward), (x, N), {})
    assert [read.value for read in record_reads(Writes(), call)] == [True]
    assert torch.equal(x, torch.zeros(2, 3))


def test_nan_is_read_as_nan() -> None:
    class Fallback(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            value = n[0].item()
            return x if value != value else 2 * x

    graph = traced(Fallback(), X, N * torch.nan)
    assert graph.reads is not None and graph.reads.holds({"n": N * torch.nan}) and not graph.reads.holds({"n": N})


@pytest.mark.parametrize("through", ["a slice", "the whole", "assignment"])
def test_what_is_written_through_data_is_traced(through: str) -> None:
    """CogVideoX fills its positions through ``.data``; torch lost the write or did not export."""

    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            positions = x.new_zeros(x.shape)
            if through == "a slice":
                positions.data[:, 1:].copy_(torch.arange(2.0).expand(2, 2))
            elif through == "the whole":
                positions.data.fill_(2.0)
            else:
                positions.data = torch.full((2, 3), 3.0)
            return x + positions.data

    graph = traced(Positions(), X)
    placeholders = graph.graph_module.graph.find_nodes(op="placeholder")
    inputs = {**graph.weights, "x": X}
    (out,) = graph.graph_module(*(inputs[str(p.target)] for p in placeholders))
    assert torch.equal(out, Positions()(X)) and not torch.equal(out, X)
