"""Graphs by shape: exported twice, then derived."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.by_shape import GraphsByShape
from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._say_once import SayOnce
from tests.models.tiny import TINY, tiny_model
from tests.small_denoiser import denoiser


@pytest.mark.parametrize(
    ("name", "changes", "exports"),
    [
        ("Flux", [{"height": 16, "text": 7}, {"height": 16, "width": 24, "text": 9}], 2),
        ("Chroma", [{"batch": 3}], 2),
    ],
)
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
def test_diffusers_transformers_at_other_sizes(name: str, changes: list[dict[str, int]], exports: int) -> None:
    diffusers_calls = pytest.importorskip("fusion_compile._sampler.without_weights.diffusers_calls")
    pytest.importorskip("diffusers")
    model = tiny_model(name)
    signature = inspect.signature(model.forward)
    ours = GraphsByShape(model, SayOnce())
    for change in ({}, *changes):
        sizes = diffusers_calls.CallSizes(**{**vars(TINY[name].sizes), **change})
        call = take_apart(signature, (), diffusers_calls.example_call(model, 2, sizes).arguments)
        graph = ours.of(call)
        given = {**graph.weights, **dict(zip(graph.inputs, call.tensors, strict=True))}
        names = [node.name for node in graph.graph_module.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            (got, *_), (expected, *_) = (
                graph.graph_module(*map(given.get, names)),
                model(**{**call.arguments, "return_dict": False}),
            )
        assert torch.equal(got, expected)
    assert ours.n_exports == exports


class Special(nn.Module):
    """Makes a number of the batch in its forward, as a list of that length does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = x * self.inner(t[:, None]) + torch.tensor([1.0] * x.shape[0])[:, None]
        return out


def test_the_first_shape_is_exported_the_second_with_symbols_and_the_rest_derived() -> None:
    model = denoiser()
    signature = inspect.signature(model.forward)
    graphs = GraphsByShape(model, SayOnce())
    exports = []
    for batch in (2, 3, 4, 3):
        call = take_apart(signature, (torch.randn(batch, 4), torch.rand(batch), torch.zeros(batch).long()), {})
        assert graphs.of(call).inputs == ("x", "timestep", "y")
        exports.append(graphs.n_exports)
    assert exports == [1, 2, 2, 2]
    graphs.drop_all()
    graphs.of(call)
    assert graphs.n_exports == 3


def test_a_size_that_two_traces_made_a_number_of_is_given_up_with_a_warning() -> None:
    model = Special().eval()
    signature = inspect.signature(model.forward)
    graphs = GraphsByShape(model, SayOnce())
    with pytest.warns(UserWarning, match=r"Special makes numbers of x.shape\[0\], t.shape\[0\]"):
        for batch in (2, 3, 4, 5):
            graphs.of(take_apart(signature, (torch.randn(batch, 6), torch.rand(batch)), {}))
    assert graphs.n_exports == 4
