"""A graph derived from symbols is, node for node, the one that export gives."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from dit import DiT
from torch import fx, nn

from fusion_compile._sampler.graph.by_shape import GraphsByShape
from fusion_compile._sampler.graph.call import Call, take_apart
from fusion_compile._sampler.graph.export import export_denoiser, trace_denoiser
from fusion_compile._sampler.graph.symbolic import SymbolicGraph
from fusion_compile._say_once import SayOnce
from fusion_compile.passes import format_graph
from tests.convolutional_denoiser import Convolutional, noise
from tests.small_denoiser import denoiser


def canonical(module: fx.GraphModule) -> str:
    """The graph as text, with nodes numbered. A slice's open ends are None, 0 or the largest number."""
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        if node.op == "call_function":
            known[node]._rename(f"n{len(known)}")
    return re.sub(
        r"(slice\.Tensor\(\w+, \d+), (?:0|None)(, \d+)?(?:, 9223372036854775807)?", r"\1, _\2", format_graph(graph)
    )


@pytest.mark.parametrize("model", [DiT(hidden_size=16, depth=1, num_heads=2, num_classes=None), Convolutional()])
def test_a_derived_graph_is_node_for_node_the_exported_one(model: nn.Module) -> None:
    signature = inspect.signature(model.eval().forward)
    ours = GraphsByShape(model, SayOnce())
    for batch in (2, 3, 4):
        args = (
            noise(batch, 8, 8, 5)
            if isinstance(model, Convolutional)
            else (torch.randn(batch, 1, 8, 8), torch.rand(batch))
        )
        call = take_apart(signature, args, {})
        derived, exported = ours.of(call), trace_denoiser(model, call)
        assert canonical(derived.graph_module) == canonical(exported.graph_module)
        assert (derived.inputs, derived.full_names) == (exported.inputs, exported.full_names)
    assert ours.n_exports == 2


def symbolic(batch: int) -> tuple[SymbolicGraph, inspect.Signature]:
    model = denoiser()
    signature = inspect.signature(model.forward)
    dims = {(0, 0), (1, 0), (2, 0)}
    return SymbolicGraph(export_denoiser(model, call_of(signature, batch), dims)), signature


def call_of(signature: inspect.Signature, batch: int) -> Call:
    return take_apart(signature, (torch.randn(batch, 4), torch.rand(batch), torch.zeros(batch).long()), {})


def test_sizes_that_fit_are_specialised_to_numbers() -> None:
    graph, signature = symbolic(3)
    call = call_of(signature, 5)
    assert graph.refuses(call) is None and graph.fixed({(0, 0)}) == {}
    specialised = graph.specialise(call).graph_module
    sizes = {node.name: tuple(node.meta["val"].shape) for node in specialised.graph.find_nodes(op="placeholder")}
    assert (sizes["x"], sizes["timestep"], sizes["y"]) == ((5, 4), (5,), (5,))


def test_sizes_that_contradict_each_other_are_refused_by_name() -> None:
    graph, signature = symbolic(3)
    call = take_apart(signature, (torch.randn(5, 4), torch.rand(5), torch.zeros(6).long()), {})
    refusal = graph.refuses(call)
    assert refusal is not None and "shape[0] is" in refusal
