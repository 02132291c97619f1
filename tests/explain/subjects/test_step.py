"""The explanation of a training step: its tables as text, its regions and its findings."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import torch
from expecttest import TestCase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from fusion_compile._program.program import Program, refuse_host_syncs
from tests.explain.run.lines import line_of


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def step_of(model: nn.Module, *, backend: str = "aot_eager") -> fc.TrainingStep:
    step = fc.compile_training_step(model, squares, mode="default", backend=backend)
    step(torch.randn(2, 128))
    return step


class Pictures(TestCase):
    maxDiff = None

    def test_banks_and_routes_of_a_small_step(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 130))
        text = str(fc.explain(step_of(model)))
        picture = "\n".join(line.rstrip() for line in text.split("Hyperparameters")[0].splitlines()).strip()
        self.assertExpectedInline(
            picture,
            """\
TrainingStep(sf_normuon, 6 parameters in 3 banks (2 spectral), mode='default', 1 program)

Banks
bank                      shape      parameters  entries  MiB with state
spectral/256x128/float32  1×256×128           1   32,768            0.38
scalar/float32            17156               4   17,154            0.20
spectral/128x256/float32  1×128×256           1   32,768            0.38

State by field
field    kept as   MiB  bytes a parameter
weights  float32  0.32              4.000
z        float32  0.32              4.000
mu       float32  0.25              3.170
nu       float32  0.07              0.848

Routing
parameter  how many  shape    role      why
0.weight          1  256×128  spectral  256×128 matrix
0.bias            1  256      scalar    1-D
2.weight          1  128×256  spectral  128×256 matrix
2.bias            1  128      scalar    1-D
4.weight          1  130×128  scalar    output head
4.bias            1  130      scalar    1-D""",
        )


def test_every_call_of_the_graph_is_in_one_region_and_the_newton_schulz_in_the_optimizers() -> None:
    torch.manual_seed(0)
    step = step_of(nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 4)))
    (program,) = step.programs
    counts = program.operators()
    calls = sum(n.op == "call_function" for n in program.aten.graph.nodes)
    assert sum(c.total() for c in counts.values()) == calls
    assert counts["forward"]["tanh"] == 1
    assert counts["backward"]["tanh_backward"] == 1
    assert counts["optimizer"]["baddbmm"] == 10  # one spectral bank, five plain iterations of two
    assert counts["state"]["copy_"] > 0


def test_a_factorization_in_the_loss_is_found_with_the_users_line_and_refused() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        gram = model(x).T @ model(x)
        return torch.linalg.lstsq(gram, gram).solution.sum()  # the line that must be named

    step = fc.compile_training_step(nn.Linear(4, 4), loss, optimizer="adamw", mode="default", backend="aot_eager")
    with pytest.raises(ValueError, match=r"test_step\.py:\d+") as refusal:
        step(torch.randn(8, 4))
    named = int(str(refusal.value).split("test_step.py:")[1].split(":")[0].split("\n")[0])
    with open(__file__) as source:
        assert "the line that must be named" in source.read().splitlines()[named - 1]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_a_sync_that_only_the_backward_has_is_found_by_the_thorough_search() -> None:
    class ReadsInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad + torch.linalg.svdvals(grad.reshape(1, -1)).sum()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return ReadsInBackward.apply(model(x)).sum()

    step = fc.compile_training_step(nn.Linear(4, 4), loss, optimizer="adamw", mode="default", backend="aot_eager")
    try:
        step(torch.randn(8, 4))
    except ValueError as refused:  # seen at once where Dynamo keeps the backward as a subgraph
        assert "svdvals" in str(refused)
        return
    (program,) = step.programs
    findings = program.findings(thorough=True)
    assert any("svd" in f.op for f in findings)
    with pytest.raises(ValueError, match="svd"):
        refuse_host_syncs(findings, on_cpu=False)


def test_explain_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="explain\\(\\) got a Linear"):
        fc.explain(nn.Linear(2, 2))


def test_an_uncompiled_step_says_that_nothing_was_captured() -> None:
    step = fc.compile_training_step(nn.Linear(4, 4), squares, mode="eager")
    text = str(fc.explain(step))
    assert "nothing was captured yet" in text
    assert not any(isinstance(p, Program) for p in step.programs)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)  # the checkpoint
        return x


@pytest.fixture(scope="module")
def both() -> dict[str, fc.Explanation]:
    """The same step, captured by reading and by running, after one watched call."""
    found: dict[str, fc.Explanation] = {}
    ways: tuple[Literal["read", "run"], ...] = ("read", "run")
    for way in ways:
        torch.manual_seed(0)
        step = fc.compile_training_step(
            Blocks(), squares, optimizer="adamw", mode="default", backend="aot_eager", capture=way
        )
        found[way] = fc.explain(step, (torch.randn(3, 8),))
    return found


def test_both_ways_of_capture_show_the_same_regions_and_costs(both: dict[str, fc.Explanation]) -> None:
    read, run = (both[way].graphs[0] for way in ("read", "run"))
    assert {r.name for r in read.regions} == {"forward", "backward", "optimizer", "state"}
    for name in ("forward", "backward", "optimizer"):
        mine, theirs = (next(r for r in graph.regions if r.name == name) for graph in (read, run))
        assert (mine.launches, mine.flops, mine.bytes) == (theirs.launches, theirs.flops, theirs.bytes), name
    assert read.memory.peak_bytes == run.memory.peak_bytes


def test_both_ways_of_capture_name_the_modules(both: dict[str, fc.Explanation]) -> None:
    read, run = (
        Counter((n.region, n.op, n.module) for n in both[way].graphs[0].nodes if n.flops) for way in ("read", "run")
    )
    assert read == run
    modules = {module for _, _, module in run}
    assert modules == {f"blocks.{block}.{layer}" for block in (0, 1) for layer in (0, 2)}


@pytest.mark.parametrize("way", ["read", "run"])
def test_both_ways_of_capture_mark_what_is_recomputed_and_keep_the_users_line(
    both: dict[str, fc.Explanation], way: str
) -> None:
    told = both[way]
    (graph,) = told.graphs
    again = [n for n in graph.nodes if n.recomputed]
    assert {n.region for n in again} == {"backward"} and {n.recomputed for n in again} == {1, 2}
    assert sum(n.op == "aten.addmm.default" for n in again) == 2  # the second product of a block is not needed again
    assert {n.where for n in again} == {line_of(__file__, "the checkpoint")}
    forward = {n.where for n in graph.nodes if n.region == "forward" and n.flops}
    assert forward == {line_of(__file__, "the checkpoint")}
    assert "computed again for the backward: checkpointed region" in told.why(again[0].name)
    lines = {line.label: line.value for line in told.summary}
    assert lines["recomputed"].endswith("in 2 checkpointed regions")
    assert any("recompute 2 checkpointed regions" in section.heading for section in told.sections)
    assert told.runtime is not None and told.runtime.phases
    assert lines["graph breaks"] == "0"


@pytest.mark.parametrize("way", ["read", "run"])
def test_both_ways_of_capture_find_a_tensor_on_the_cpu_at_the_users_line(way: Literal["read", "run"]) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weights = torch.linspace(0, 1, 4)  # the table
        on_the_device = torch.ones(4, device=x.device)
        return (model(x).square() * weights * on_the_device).mean()

    step = fc.compile_training_step(nn.Linear(4, 4), loss, optimizer="adamw", backend="aot_eager", capture=way)
    (finding,) = fc.explain(step, (torch.randn(8, 4),)).findings
    assert (finding.kind, finding.op, finding.where) == ("cpu_tensor", "linspace", line_of(__file__, "the table"))


@pytest.mark.parametrize("way", ["read", "run"])
def test_both_ways_of_capture_find_an_operator_at_the_users_line(way: Literal["read", "run"]) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return torch.linalg.lstsq(model(x), x).solution.sum()  # the factorization

    step = fc.compile_training_step(nn.Linear(4, 4), loss, optimizer="adamw", backend="aot_eager", capture=way)
    with pytest.raises(ValueError, match="lstsq") as refused:
        fc.explain(step, (torch.randn(8, 4),))
    assert line_of(__file__, "the factorization") in str(refused.value)


def test_looking_at_a_step_draws_no_random_number() -> None:
    """The costs of attention with dropout came from a run that drew, and the training went on with other numbers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    step = fc.compile_training_step(layer, squares, optimizer="adamw", backend="aot_eager", capture="run")
    step(torch.randn(2, 3, 8))
    before = torch.get_rng_state()
    fc.explain(step)
    assert torch.equal(torch.get_rng_state(), before)
