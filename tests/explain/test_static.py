"""The static layer: FLOPs as torch counts them, memory as the profiler saw it, places, regions, roofline, findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dit import DiT
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fusion_compile as fc
from benchmarks._measure import peak_of_call
from fusion_compile._compat import fake_mode
from fusion_compile.explain._facts import GraphFacts
from fusion_compile.explain._graph.roofline import ROOFLINES, roofline
from tests.dit_problem import batch, loss_fn, small_dit

CPU = torch.device("cpu")


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.Flatten(), nn.Linear(8 * 3 * 3, 5),
    )  # fmt: skip


def image_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def sd3_block() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers.models.attention import JointTransformerBlock

    return JointTransformerBlock(32, 2, 16), (torch.randn(2, 16, 32), torch.randn(2, 6, 32), torch.randn(2, 32))


def attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.MultiheadAttention(32, 4, batch_first=True), (torch.randn(2, 24, 32),) * 3


def vision_transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).eval(), (torch.randn(2, 3, 16, 16),)


def gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    return GPT2Model(config).eval(), (torch.randint(0, 50, (2, 12)),)


@pytest.fixture(scope="module")
def dit() -> tuple[fc.TrainingStep, int]:
    """A step of the two-block transformer, and the peak of its second call as the profiler saw it."""
    step = fc.compile_training_step(small_dit(), loss_fn, backend="aot_eager")
    step(*batch(1))
    return step, measured_peak(step, batch(1))


@pytest.fixture
def dit_step(dit: tuple[fc.TrainingStep, int]) -> fc.TrainingStep:
    return dit[0]


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def flops(graph: GraphFacts, *regions: str) -> int:
    return sum(r.flops for r in graph.regions if r.name in regions or not regions)


# ---------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("make", [sd3_block, attention, vision_transformer, gpt2])
def test_flops_of_a_forward_agree_with_torch(make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    """Attention is written out as matrix products in both: torch's counter takes the CPU's own kernel for free."""
    model, inputs = make()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        (graph,) = fc.explain(model, *inputs, run=False).graphs
        assert flops(graph) == pytest.approx(counted(lambda: model(*inputs)), rel=0.01)
    assert flops(graph) > 0


def test_flops_of_forward_and_backward_agree_with_torch(dit_step: fc.TrainingStep) -> None:
    """The transformer's attention is a kernel whose backward computes the scores again, hence half a percent more."""
    model, data = convolutional(), (torch.randn(2, 3, 8, 8), torch.randint(0, 5, (2,)))
    step = fc.compile_training_step(model, image_loss, optimizer="adamw", backend="aot_eager")
    step(*data)
    for explained, loss, given in ((step, image_loss, data), (dit_step, loss_fn, batch(1))):
        (graph,) = explained.explain().graphs
        with sdpa_kernel(SDPBackend.MATH):
            expected = counted(lambda e=explained, f=loss, g=given: f(e.model, *g).backward())
        explained.model.zero_grad()
        assert flops(graph, "forward", "backward") == pytest.approx(expected, rel=0.01)
        assert flops(graph, "state") == 0


def test_attention_on_a_cpu_is_counted_though_torch_does_not() -> None:
    q = torch.randn(1, 2, 8, 16)
    (graph,) = fc.explain(lambda q: F.scaled_dot_product_attention(q, q, q), q, run=False).graphs
    assert flops(graph) == 2 * (2 * 2 * 8 * 8 * 16)  # two products of [8, 16] and [16, 8], two heads


# ---------------------------------------------------------------------------------------------------- memory


def measured_peak(step: fc.TrainingStep, data: tuple[Tensor, ...]) -> int:
    """Bytes at the highest point of a step, its state and batch included."""

    def kept() -> list[Tensor]:
        return [*step._state.values(), *data, *step.model.buffers()]

    return peak_of_call(lambda: step(*data), CPU, kept)


@pytest.mark.parametrize("problem", ["digits", "two blocks"])
def test_peak_memory_is_what_the_profiler_measured(problem: str, dit: tuple[fc.TrainingStep, int]) -> None:
    """``aot_eager`` runs the graph operator by operator, which is what the walk models; 10 % is the promise."""
    step, measured = dit
    if problem == "digits":
        model, data = DiT(hidden_size=64, depth=2, class_dropout_prob=0.1), batch(1, 32)  # as the example's, narrower
        step = fc.compile_training_step(model, loss_fn, optimizer="adamw", backend="aot_eager")
        step(*data)
        measured = measured_peak(step, data)
    (graph,) = step.explain().graphs
    assert graph.memory.peak_bytes == pytest.approx(measured, rel=0.1)
    assert max(graph.memory.curve) == graph.memory.peak_bytes
    assert sum(a.bytes for a in graph.memory.alive_at_peak) == graph.memory.peak_bytes


@pytest.mark.parametrize("problem", ["two blocks", pytest.param("digits", marks=pytest.mark.exhaustive)])
def test_the_fused_peak_is_near_what_inductor_needs(problem: str) -> None:
    """With few images the optimizer has the peak, and run operator by operator it would need half as much again."""
    model, data = small_dit(), batch(1)
    if problem == "digits":
        model, data = DiT(hidden_size=64, depth=2, class_dropout_prob=0.1), batch(1, 32)
    step = fc.compile_training_step(model, loss_fn, optimizer="adamw", mode="default")
    step(*data)
    measured = measured_peak(step, data)
    (graph,) = step.explain().graphs
    assert graph.memory.fused_peak_bytes == pytest.approx(measured, rel=0.1)
    if problem == "two blocks":
        assert graph.memory.peak_bytes > 1.3 * measured


def test_memory_counts_a_view_and_a_write_in_place_as_the_memory_that_they_look_at() -> None:
    def program(x: Tensor) -> Tensor:
        y = x * 2  # new: 64 bytes
        y.view(4, 4).add_(1)
        z = y[:8] + 1  # new: 32 bytes
        return z.sum()  # new: 4 bytes; y is gone by then

    (graph,) = fc.explain(program, torch.randn(16), run=False).graphs
    by_name = dict(zip((n.name for n in graph.nodes), graph.memory.curve, strict=True))
    assert by_name["x"] == 64
    assert graph.memory.peak_bytes == 64 + 64 + 32
    assert by_name[graph.nodes[-1].name] == 64 + 32 + 4


# ---------------------------------------------------------------------------------------------------- places


def test_nodes_of_forward_and_backward_know_their_module_and_line(dit_step: fc.TrainingStep) -> None:
    (graph,) = dit_step.explain().graphs
    products = [n for n in graph.nodes if n.module == "blocks.1.attn.qkv" and n.flops]
    assert {n.region for n in products} == {"forward", "backward"}
    assert len(products) == 3
    assert all("dit.py:" in n.where for n in products)
    assert len({n.where for n in products}) == 1  # the gradient's line is the forward's
    names = {n.name for n in graph.nodes if n.region == "input"}
    assert {"state/counts/step", "batch/0", "model/pos_embed"} <= names


def test_regions_add_up_and_bytes_cross_between_them(dit_step: fc.TrainingStep) -> None:
    (graph,) = dit_step.explain(device="h100").graphs
    assert {r.name for r in graph.regions} == {"forward", "backward", "optimizer", "state"}
    for region in graph.regions:
        own = [n for n in graph.nodes if n.region == region.name]
        assert region.flops == sum(n.flops for n in own)
        assert region.bytes == sum(n.bytes_read + n.bytes_written for n in own)
    assert all(0 <= i < at for at, n in enumerate(graph.nodes) for i in n.inputs)
    crossing = {(a, b): size for a, b, size in graph.edges}
    assert crossing["forward", "backward"] > 0
    assert ("optimizer", "forward") not in crossing


def test_views_cost_nothing_and_an_expanded_operand_is_read_once() -> None:
    def program(x: Tensor, row: Tensor) -> Tensor:
        return x.t().reshape(4, 8) + row.expand(4, 8)

    (graph,) = fc.explain(program, torch.randn(8, 4), torch.randn(8), run=False).graphs
    nodes = {n.op.split(".")[1]: n for n in graph.nodes if n.region != "input"}
    assert nodes["t"].launches == nodes["expand"].bytes_read == nodes["expand"].bytes_written == 0
    assert nodes["add"].bytes_read == 4 * 8 * 4 + 8 * 4
    assert nodes["add"].bytes_written == 4 * 8 * 4


def test_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    h100 = roofline("H100", CPU)
    assert h100.microseconds(10**12, 0, torch.bfloat16) == pytest.approx(1e6 / 989.4)
    assert h100.microseconds(1, 3_350_000, torch.float32) == pytest.approx(1.0)
    assert h100.peak(torch.float32) == 66.9e12  # torch's default, "highest"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert h100.peak(torch.float32) == 494.7e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(ROOFLINES) == {"h100", "h200", "a100", "b200", "l40s", "rtx4090", "mi300x", "cpu"}
    with pytest.raises(ValueError, match=r"h99.*use one of h100, h200"):
        roofline("h99", CPU)


# ---------------------------------------------------------------------------------------------------- subjects


def test_an_exported_program_and_a_graph_module_are_explained_without_running() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    exported = torch.export.export(model, (torch.randn(3, 4),), strict=False)
    traced = fx.symbolic_trace(model)
    for explanation in (fc.explain(exported), fc.explain(traced, torch.randn(3, 4))):
        (graph,) = explanation.graphs
        assert flops(graph) == 2 * 3 * (4 * 8 + 8 * 2)
        assert {"0.weight", "2.bias"} <= {n.name for n in graph.nodes}
        assert {n.module for n in graph.nodes if n.flops} == {"0", "2"}
        assert explanation.runtime is None
    with pytest.raises(ValueError, match="takes 1 inputs"):
        fc.explain(traced)


def test_a_graph_of_fake_gpu_tensors_is_judged_as_the_gpus_without_one() -> None:
    with fake_mode(), torch.no_grad():
        x = torch.randn(8, 8, device="cuda")

        def program(x: Tensor) -> tuple[Tensor, ...]:
            return torch.linalg.eigh(x @ x.T)[0], x.cpu(), x + torch.ones(())

        module = make_fx(program)(x)
    explanation = fc.explain(module, device="h200")
    assert explanation.environment.device == "cuda"
    assert [(f.kind, f.op) for f in explanation.findings] == [
        ("capture_unsafe", "aten._linalg_eigh.default"),
        ("host_sync", "aten._to_copy.default"),
        ("cpu_tensor", "ones"),
    ]
    assert "h200" in explanation.environment.roofline


def test_what_cannot_be_one_graph_is_explained_in_pieces_and_left_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            y = self.linear(x)
            if y.sum() > 0:
                y = y * 2
            return self.linear(y)

    model, x = Counts(), torch.randn(2, 4)
    explanation = fc.explain(model, x, backend="eager")
    assert len(explanation.graphs) == 2
    assert flops(explanation.graphs[0]) == flops(explanation.graphs[1]) == 2 * 2 * 4 * 4
    assert [f.kind for f in explanation.findings] == ["host_sync"]
    assert float(model.calls) == 0


def test_a_watched_training_step_is_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    step = fc.compile_training_step(model, image_loss, optimizer="adamw", backend="aot_eager")
    before = [p.detach().clone() for p in model.parameters()]
    explanation = fc.explain(step, torch.randn(3, 4), torch.tensor([0, 1, 1]))
    assert explanation.runtime is not None and explanation.findings == ()
    assert step.steps_called == 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    model.weight.data = model.weight.data.clone()
    (finding,) = fc.explain(step).findings
    assert (finding.kind, finding.op) == ("rebound_parameter", "weight")


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


def test_what_cannot_be_explained_is_refused_with_what_can() -> None:
    with pytest.raises(TypeError, match="got a int; give what"):
        fc.explain(3)
    with pytest.raises(TypeError, match="Linear without inputs"):
        fc.explain(nn.Linear(2, 2))


# ---------------------------------------------------------------------------------------------------- a sampler


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


# ---------------------------------------------------------------------------------------------------- no trace left


def test_what_is_not_being_explained_is_left_alone(dit_step: fc.TrainingStep) -> None:
    """No hook, no handler, no setting stays, and the step's call is the same code before and after."""

    def surroundings() -> dict[str, Any]:
        import logging

        import torch._inductor.config

        trace = logging.getLogger("torch.__trace")
        return {
            "handlers": [*trace.handlers],
            "level": trace.level,
            "dynamo": torch._dynamo.config.get_config_copy(),
            "inductor": torch._inductor.config.get_config_copy(),
            "attributes": set(vars(dit_step)),
            "model": [set(vars(m)) for m in dit_step.model.modules()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in dit_step.model.modules()],
            "call": type(dit_step).__call__,
            "compiled": [run for runs in dit_step._compiled.values() for run in runs.values()],
            "grad": torch.is_grad_enabled(),
            "random": torch.get_rng_state().tolist(),
        }

    dit_step.explain()
    before = surroundings()
    fc.explain(dit_step)
    fc.explain(nn.Linear(4, 4), torch.randn(2, 4), backend="eager")
    fc.explain(torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),), strict=False))
    after = surroundings()
    after["random"] = before["random"]  # the inputs above drew from it
    assert {k for k in before if before[k] != after[k]} == set()
