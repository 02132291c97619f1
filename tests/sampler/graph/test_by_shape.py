"""Graphs by shape: exported twice, then derived."""

from __future__ import annotations

import inspect

import pytest
import torch

from fusion_compile._sampler.graph.by_shape import GraphsByShape
from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._say_once import SayOnce
from tests.models.tiny import TINY, tiny_model


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
    ours = GraphsByShape(model, signature, SayOnce())
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
