"""The one caller of torch.compile: modes, observers, and no silent recompile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from fusion_compile._program import lower as program_lower
from fusion_compile._program.lower import MODES, lower, no_recompile, resolve_mode, without_cuda_graph


def add_one(t: Tensor) -> Tensor:
    return t + 1


def test_modes_by_device() -> None:
    assert resolve_mode(None, torch.device("cuda")) == "max-autotune"
    assert resolve_mode(None, torch.device("cpu")) == "default"
    assert [resolve_mode(mode, torch.device("cpu")) for mode in MODES] == list(MODES)
    with pytest.raises(ValueError, match=r"mode='fast' is not known; use one of 'default'"):
        resolve_mode("fast", torch.device("cpu"))


def test_without_a_cuda_graph() -> None:
    assert {mode: without_cuda_graph(mode) for mode in MODES} == {
        "default": "default",
        "reduce-overhead": "default",
        "max-autotune": "max-autotune-no-cudagraphs",
        "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs",
        "eager": "eager",
    }


def test_eager_gives_the_function_back() -> None:
    assert lower(add_one, mode="eager", backend="nonsense") is add_one


def test_an_observer_sees_the_graph_before_the_backend() -> None:
    seen: list[fx.GraphModule] = []
    run = lower(add_one, mode="default", backend="aot_eager", on_graph=lambda graph, inputs: seen.append(graph))
    assert not seen
    assert torch.equal(run(torch.zeros(2)), torch.ones(2))
    assert len(seen) == 1 and any(n.op == "call_function" for n in seen[0].graph.nodes)


def test_a_recompile_is_refused_with_the_reason_and_other_errors_pass() -> None:
    run = lower(add_one, mode="default", backend="aot_eager")
    run(torch.zeros(2))
    with no_recompile():
        run(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"no longer fits what surrounds it \(.*size mismatch"), no_recompile():
        run(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"^mine$"), no_recompile():
        raise RuntimeError("mine")


def test_a_program_that_torch_dropped_is_refused_with_that_reason() -> None:
    run = lower(add_one, mode="default", backend="aot_eager")
    run(torch.zeros(2))
    torch.compiler.reset()
    words = r"^torch no longer has the compiled program.*torch\.compiler\.reset\(\)"
    with pytest.raises(RuntimeError, match=words), no_recompile():
        run(torch.zeros(2))


def test_a_gpu_without_a_compiler_that_works_is_refused_before_anything_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(program_lower, "why_no_kernels", lambda: "Triton is not installed; install it.")
    with pytest.raises(RuntimeError, match=r"^mode='max-autotune' on cuda: Triton is not installed; install it\.$"):
        resolve_mode(None, gpu, "inductor")
    assert resolve_mode("eager", gpu, "inductor") == "eager"
    assert resolve_mode(None, gpu, "aot_eager") == "max-autotune", "another compiler needs no Triton"
    assert resolve_mode(None, torch.device("cpu"), "inductor") == "default"
    monkeypatch.setattr(program_lower, "why_no_kernels", str)
    assert resolve_mode(None, gpu, "inductor") == "max-autotune"
