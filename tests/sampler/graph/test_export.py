"""A denoiser exported for one call: weights and arguments by name, and the same bits."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.call import Call, take_apart
from fusion_compile._sampler.graph.export import DenoiserGraph, export_denoiser, find_tensor, trace_denoiser
from tests.small_denoiser import X, Y, denoiser

T = torch.full((2,), 0.5)


def call_of(model: nn.Module, *args: Tensor) -> Call:
    return take_apart(inspect.signature(model.forward), args, {})


def trace(model: nn.Module, *args: Tensor) -> DenoiserGraph:
    return trace_denoiser(model, call_of(model, *args))


def test_the_graph_gives_the_models_bits_from_its_own_weights() -> None:
    model = denoiser()
    traced = trace(model, X, T, Y)
    assert traced.inputs == ("x", "timestep", "y")
    assert set(traced.full_names.values()) == set(model.state_dict())
    assert all(traced.weights[n] is model.get_parameter(full) for n, full in traced.full_names.items())
    given = {**traced.weights, **dict(zip(traced.inputs, (X, T, Y), strict=True))}
    names = [node.name for node in traced.graph_module.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        (got,) = traced.graph_module(*map(given.__getitem__, names))
        assert torch.equal(got, model(X, T, Y))


def test_symbolic_sizes_are_symbols_until_the_graph_is_made_for_numbers() -> None:
    model = denoiser()
    exported = export_denoiser(model, call_of(model, X, T, Y), {(0, 0), (1, 0), (2, 0)})
    (x,) = [n for n in exported.graph_module.graph.find_nodes(op="placeholder") if n.name == "x"]
    assert not isinstance(x.meta["val"].shape[0], int) and int(x.meta["val"].shape[1]) == 4


def test_a_model_that_writes_a_buffer_or_gives_an_unknown_object_is_refused() -> None:
    class Counts(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * 2

    class Iterates(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, object]:
            return x * 2, iter(())

    with pytest.raises(ValueError, match=r"Counts writes .*calls in its forward \(BUFFER_MUTATION\)"):
        trace(Counts(), torch.ones(2))
    with pytest.raises(ValueError, match="Iterates returns a tuple_iterator, which a graph of tensors cannot make"):
        trace(Iterates(), torch.ones(2))


def test_a_tensor_is_found_by_its_full_name() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    assert find_tensor(model, "0.weight") is model[0].weight
    assert find_tensor(model, "0.running_mean") is model[0].running_mean
    with pytest.raises(AttributeError, match=r"Sequential has no parameter or buffer '0\.nothing'"):
        find_tensor(model, "0.nothing")
