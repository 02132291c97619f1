"""The explanation of a sampler: binding times, hoisting, freed weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dit import DiT

import fusion_compile as fc
from tests.dit_problem import batch, small_dit


def test_a_loop_that_is_no_cuda_graph_though_its_mode_asks_for_one_is_a_finding() -> None:
    model = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2).eval()
    given = (torch.randn(2, 1, 8, 8), torch.full((2,), 0.5), torch.tensor([1, 2]))
    sampler = fc.optimize_sampler(model, 2, mode="eager", example_inputs=given)
    (program,) = sampler._programs.values()
    assert fc.explain(sampler).findings == ()
    program._body = dataclasses.replace(program._body, not_captured="it reads tensors on cpu and cuda:0.")
    (finding,) = fc.explain(sampler).findings
    assert finding.kind == "cudagraph_skip" and finding.why.endswith("it reads tensors on cpu and cuda:0.")
    assert "it reads tensors on cpu and cuda:0" in str(sampler.report)


@pytest.fixture(scope="module")
def sampler_explanation() -> fc.Explanation:
    x, _, _, y = batch(1, 2)
    sampler = fc.optimize_sampler(small_dit().eval(), 4, mode="eager")
    sampler(x, torch.ones(2), y)
    return fc.explain(sampler)


def test_a_sampler_tells_of_each_weight_whether_it_is_freed_and_why(sampler_explanation: fc.Explanation) -> None:
    freed = sampler_explanation.why("blocks.0.adaLN_modulation.1.weight")
    assert "weight freed" in freed and "release_weights" in freed
    kept = sampler_explanation.why("blocks.0.attn.qkv.weight")
    assert "weight kept" in kept and "at every step, in linear" in kept
    assert sampler_explanation.hoisting is not None
    by_kind: dict[str, int] = {}
    for value in sampler_explanation.hoisting.values:
        by_kind[value.decision] = by_kind.get(value.decision, 0) + value.frees_bytes
    assert by_kind["weight_freed"] > 0 and by_kind["weight_kept"] == 0
    assert {"hoisted", "live"} <= set(by_kind)
    with pytest.raises(KeyError, match=r"blocks\.0\.attn\.qkv\.weight"):
        sampler_explanation.why("blocks.0.attn.kqv.weight")


def test_a_samplers_nodes_carry_their_time_and_the_chain_that_fixes_it(sampler_explanation: fc.Explanation) -> None:
    (graph,) = sampler_explanation.graphs
    assert {r.name for r in graph.regions} == {"table", "prologue", "body"}
    assert {n.binding_time for n in graph.nodes} == {"const", "step", "request", "step_request", "live"}
    assert sampler_explanation.hoisting is not None
    values = {v.name: v for v in sampler_explanation.hoisting.values}
    modulation = next(n for n in graph.nodes if n.module == "blocks.0.adaLN_modulation.1" and n.flops)
    story = values[modulation.name]
    assert (story.decision, story.binding_time) == ("hoisted", "step_request")
    assert story.chain[0] in ("t", "y") and story.chain[-1] == modulation.name
    (passed,) = sampler_explanation.passes
    assert passed.name == "hoist_time_conditioning" and len(passed.after) < len(passed.before)
