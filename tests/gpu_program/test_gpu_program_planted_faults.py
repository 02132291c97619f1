"""Each kind of fault, planted in a real program, is found and said in its own words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import _compat
from fusion_compile._gpu_program._compat import H100, compile_kernel, generate, pretended
from fusion_compile._gpu_program.kernels import Compilation, kernels_of
from fusion_compile._gpu_program.moved import in_aten
from fusion_compile._program.program import Program
from tests.gpu_program.generated_programs import batch_inputs, wrong_with

pytestmark = [pytest.mark.cuda_codegen, pytest.mark.timeout(3600)]


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def program_of(loss: Callable[[nn.Module, Tensor], Tensor] = squared, optimizer: str = "adamw") -> Program:
    """A step of a model with two matrix shapes and a bias: three banks under a spectral recipe."""
    model = nn.Sequential(nn.Linear(64, 192), nn.SiLU(), nn.Linear(192, 64, bias=False))
    step = fc.compile_training_step(model, loss, optimizer=optimizer, backend="eager")
    step(torch.ones(8, 64))
    (program,) = step.programs
    return program


def wrong(program: Program) -> list[str]:
    return wrong_with(generate(in_aten(program.graph)), batch=batch_inputs(program))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_without_a_fault_nothing_is_wrong(optimizer: str) -> None:
    assert wrong(program_of(optimizer=optimizer)) == []


def captured(fn: Callable[..., object], *inputs: Tensor) -> torch.fx.GraphModule:
    graphs = []

    def keep(graph: torch.fx.GraphModule, given: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compile(fn, backend=keep, fullgraph=True)(*inputs)
    return graphs[0]


def test_a_number_that_is_read_on_the_cpu() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        graph = captured(lambda x: x * x.sum().item(), torch.ones(4))
    with pytest.raises(ValueError, match=r"test_gpu_program_planted_faults\.py:\d+: .*brings a value to the host"):
        generate(in_aten(graph))


def test_a_scalar_on_the_cpu() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return squared(model, x) * torch.tensor(2.0)

    said = wrong(program_of(loss))
    assert any("cpu" in sentence for sentence in said), said


def test_a_factory_without_a_device() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return squared(model, x + torch.rand(64))

    sentence = (
        r"planted_faults\.py:\d+: aten\.rand\.default makes a tensor \[64\] on the CPU, because it is given no device"
    )
    with pytest.raises(ValueError, match=sentence):
        wrong(program_of(loss))


def test_state_that_nobody_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "mark_static", lambda tensor: None)
    said = wrong(program_of())
    assert any("state that is written has no fixed address" in sentence for sentence in said), said


def test_a_kernel_that_cannot_be_compiled() -> None:
    """The end of the gradient's norm as it once was: the last bank's sum is added to another's, and the root is stored
    and decides what else is stored."""

    def norm(rows: Tensor, first: Tensor, second: Tensor, kept: Tensor, taken: Tensor, skipped: Tensor) -> Tensor:
        found = (first + second + rows.sum()).sqrt()
        finite = torch.isfinite(found)
        taken.copy_(torch.where(finite, taken + 1, taken))
        skipped.copy_(skipped + (~finite))
        kept.copy_(found)
        return found

    zero, none = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    graph = captured(norm, torch.ones(256), zero, zero.clone(), zero.clone(), none, none.clone())
    alone, as_told = (generate(in_aten(graph), as_told=told) for told in (False, True))
    with pretended(H100):
        said = Compilation((90,), compile_kernel).add(kernels_of(alone.codes))
        assert said and all("does not compile for sm_90" in sentence for sentence in said)
        # With the sum in a kernel of its own.
        assert len(as_told.launches) == len(alone.launches) + 1
        assert Compilation((90,), compile_kernel).add(kernels_of(as_told.codes)) == []
