"""The explanation of a training step: its tables as text, its regions and its findings."""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._program.program import Program, refuse_host_syncs


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
        return torch.linalg.eigvalsh(gram).sum()  # the line that must be named

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
        refuse_host_syncs(findings)


def test_explain_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="explain\\(\\) got a Linear"):
        fc.explain(nn.Linear(2, 2))


def test_an_uncompiled_step_says_that_nothing_was_captured() -> None:
    step = fc.compile_training_step(nn.Linear(4, 4), squares, mode="eager")
    text = str(fc.explain(step))
    assert "nothing was captured yet" in text
    assert not any(isinstance(p, Program) for p in step.programs)
