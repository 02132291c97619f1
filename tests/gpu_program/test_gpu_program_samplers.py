"""A sampler's body as a GPU would run it: pieces that compile, and nothing that keeps it from being one CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dit import DiT
from expecttest import assert_expected_inline
from torch import Tensor, fx

import fusion_compile as fc
from fusion_compile._gpu_program._compat import generate
from fusion_compile._gpu_program.moved import in_aten
from tests.gpu_program.generated_programs import PROGRAMS, wrong_with
from tests.models.cases import N_STEPS, case

pytestmark = [
    pytest.mark.cuda_codegen,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in version:FutureWarning"),
]
KEPT: list[fx.GraphModule] = []


def keep(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    KEPT.append(graph)
    return graph.forward


torch._dynamo.register_backend(compiler_fn=keep, name="kept_for_gpu_program")


def launches_of_pieces(name: str, sample: Callable[[], object]) -> str:
    """Run `sample`, write every piece that it compiled, and count their launches; a piece is compiled once."""
    KEPT.clear()
    sample()
    graphs, counts = list(KEPT), Counter[str]()
    for i, graph in enumerate(graphs):
        with torch.no_grad():
            aten = in_aten(graph, gradients=False)
        found = PROGRAMS[name, i] = generate(aten, mode="max-autotune-no-cudagraphs")
        wrong = wrong_with(found, batch=None, recorded=False)
        assert not wrong, f"{name}, piece {i}: " + "\n".join(wrong)
        counts.update(launch.kind for launch in found.launches)
    return f"{name:<14} {len(graphs):>2} pieces {counts['extern']:>3} + {counts['triton']}\n"


def own_dit() -> str:
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=128, depth=4).eval()
    example = (torch.randn(2, 1, 8, 8), torch.ones(2), torch.arange(2))
    sampler = fc.optimize_sampler(
        model, n_steps=4, example_inputs=example, backend="kept_for_gpu_program", mode="max-autotune"
    )
    return launches_of_pieces("DiT, ours", lambda: sampler.sample(torch.randn_like(example[0]), example[2]))


def of_diffusers(name: str) -> str:
    c = case(name)
    sampler = fc.optimize_sampler(
        c.model, N_STEPS, timesteps=c.schedule, backend="kept_for_gpu_program", mode="max-autotune"
    )
    request = c.call()

    def sample() -> None:
        for i in range(N_STEPS):
            sampler(**c.at(request, i))

    return launches_of_pieces(name, sample)


def test_launches_of_the_pieces_of_a_sampler() -> None:
    """Library kernels + Triton kernels of all different pieces: a table's stage, a prologue and the body."""
    found = own_dit() + "".join(of_diffusers(name) for name in ("PixArt-sigma", "SD3", "Flux"))
    assert_expected_inline(
        found,
        """\
DiT, ours       5 pieces   9 + 12
PixArt-sigma    4 pieces  12 + 10
SD3             6 pieces  35 + 23
Flux            4 pieces  26 + 19
""",
    )
