"""Denoisers with the calls of well-known repositories: bitwise the model's, and their time leaves the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.passes._compat import tree_leaves
from tests.models.repository_style import Behind, Policy, Preconditioned, ProjectingSiT, Speech, TwoStreams

TIMES = (0.9, 0.5, 0.1)
Request = Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
N = 2


def ids(n: int) -> Tensor:
    return torch.randint(0, 4, (N, n, 3))


def projecting() -> Request:
    y = torch.randint(0, 10, (N,))
    return lambda t: ((torch.randn(N, 4, 8, 8), t.expand(N).clone(), y), {})


def preconditioned() -> Request:
    labels = torch.eye(5)[torch.randint(0, 5, (N,))]
    return lambda t: ((torch.randn(N, 4, 8, 8), 10 * t, labels), {})


def streams() -> Request:
    kept = {"img_ids": ids(16), "txt": torch.randn(N, 3, 6), "txt_ids": ids(3), "y": torch.randn(N, 5)}
    kept["guidance"] = torch.full((N,), 4.0)
    return lambda t: ((), {"img": torch.randn(N, 16, 4), "timesteps": t.expand(N).clone(), **kept})


def speech() -> Request:
    cond, text, mask = torch.randn(N, 8, 4), torch.randint(-1, 11, (N, 5)), torch.ones(N, 8, dtype=torch.bool)
    flags = {"drop_audio_cond": False, "drop_text": False}
    return lambda t: ((), {"x": torch.randn(N, 8, 4), "cond": cond, "text": text, "time": t, "mask": mask, **flags})


def policy() -> Request:
    seen = torch.randn(N, 6)
    return lambda t: ((torch.randn(N, 8, 5), (1000 * t).long()), {"local_cond": None, "global_cond": seen})


def behind() -> Request:
    text, y = torch.randn(N, 3, 6), torch.randn(N, 5)
    return lambda t: ((torch.randn(N, 1, 8, 8), t.expand(N).clone()), {"c_crossattn": text, "y": y})


REPOSITORIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Request]]] = {
    "REPA": (ProjectingSiT, projecting),
    "EDM2": (Preconditioned, preconditioned),
    "flux": (TwoStreams, streams),
    "F5-TTS": (Speech, speech),
    "diffusion_policy": (Policy, policy),
    "sd3-ref": (Behind, behind),
}


@pytest.mark.parametrize("name", REPOSITORIES)
@pytest.mark.covering("EDM2", "F5-TTS", "diffusion_policy", "sd3-ref")
def test_a_repositorys_own_call_is_served_bit_for_bit(name: str) -> None:
    make, request = REPOSITORIES[name]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    method = "apply_model" if name == "sd3-ref" else "forward"
    sampler = fc.optimize_sampler(model, len(TIMES), mode="eager", method=method)
    served = sampler if method == "forward" else getattr(sampler, method)
    asks = getattr(model, method)
    for of in (request(), request()):
        for t in TIMES:
            args, more = of(torch.tensor(t))
            got, expected = tree_leaves(served(*args, **more)), tree_leaves(asks(*args, **more))
            assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    (report,) = sampler.report.programs
    assert report.nodes["step"] > 0 and report.launches[1] < report.launches[0]
    assert sampler.release_weights(to="drop") > 0
    args, more = of(torch.tensor(TIMES[0]))
    assert torch.equal(tree_leaves(served(*args, **more))[0], tree_leaves(served(*args, **more))[0])
