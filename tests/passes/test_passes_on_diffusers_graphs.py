"""The passes one after the other on graphs that export writes of diffusers' transformers: noise goes, bits stay."""

from __future__ import annotations

import inspect

import pytest
import torch

from fusion_compile._sampler.graph.call import Call, take_apart
from fusion_compile._sampler.graph.export import DenoiserGraph, export_denoiser, trace_denoiser
from fusion_compile.passes import (
    BindingTime,
    count_regions,
    drop_metadata_reads,
    exchange_rates,
    fold_repeated_regions,
    hoist_time_conditioning,
    split_concatenations,
)
from fusion_compile.passes._graph import calls, impurity, op_name
from tests.models.tiny import tiny_call, tiny_model

pytest.importorskip("diffusers")


def values(graph: DenoiserGraph, call: Call) -> list[torch.Tensor]:
    known = {**graph.weights, **dict(zip(graph.inputs, call.tensors, strict=True))}
    return [known[node.name] for node in graph.graph_module.graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize(("name", "assertions"), [("Wan", 30), ("Mochi", 100)])
def test_assertions_go_and_bits_stay(name: str, assertions: int) -> None:
    model = tiny_model(name).eval()
    call = take_apart(inspect.signature(model.forward), (), tiny_call(name, model, 2).arguments)
    exported = export_denoiser(model, call)
    graph_module, given = exported.graph_module, values(exported, call)
    with torch.no_grad():
        want = graph_module(*given)
    noise = [n for n in calls(graph_module.graph) if op_name(n.target).startswith("_assert")]
    assert len(noise) > assertions
    for rewrite in (drop_metadata_reads, split_concatenations, fold_repeated_regions):
        rewrite(graph_module)
        assert not rewrite(graph_module).changed
        with torch.no_grad():
            got = graph_module(*given)
        assert all(map(torch.equal, got, want)), rewrite.__name__
    assert not [n for n in calls(graph_module.graph) if op_name(n.target).startswith("_assert") or impurity(n)]
    assert count_regions(graph_module)


def test_flux_keeps_its_rotary_tables_once() -> None:
    model = tiny_model("Flux").eval()
    call = take_apart(inspect.signature(model.forward), (), tiny_call("Flux", model, 2).arguments)
    graph = trace_denoiser(model, call)
    times = {
        name: {"hidden_states": BindingTime.LIVE, "timestep": BindingTime.STEP}.get(owner, BindingTime.REQUEST)
        for name, owner in zip(graph.inputs, call.owners, strict=True)
    }
    hoisted = hoist_time_conditioning(
        graph.graph_module, times, n_steps=4, exchange=exchange_rates(torch.device("cuda"))
    )
    nodes = {n.name: n for n in graph.graph_module.graph.nodes}
    tokens = sum(call.arguments[ids].shape[0] for ids in ("txt_ids", "img_ids"))
    tables = [n for n, time in hoisted.residuals.items() if nodes[n].meta["val"].shape[0] == tokens]
    assert [op_name(nodes[n].target) for n in tables] == ["cat", "cat"]  # cosines and sines
    assert {hoisted.residuals[n] for n in tables} == {BindingTime.REQUEST}
