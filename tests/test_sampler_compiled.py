"""The loop as Inductor compiles it: the numbers of the model but for the rounding of fused kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from tests.convolutional_denoiser import Convolutional, noise
from tests.models.cases import N_STEPS, case

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in version:FutureWarning")

ROUNDING = 1e-5
"""Of the largest output: fp32 rounds by 6e-8, sums here have at most 1,000 terms, in another order when fused."""


def furthest(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_a_convolutional_denoiser_is_compiled_with_its_rows_for_two_requests_and_released_weights() -> None:
    model = Convolutional().eval().requires_grad_(False)
    untouched = copy.deepcopy(model)
    sampler = fc.optimize_sampler(model, 3, mode="default")
    texts = [noise(2, 8, 8, 3)[2] for _ in range(2)]
    for released in (False, True):
        for text in texts:
            for t in (0.9, 0.5, 0.1):
                x, time = noise(2, 8, 8, 3)[0], torch.full((2,), t)
                got = sampler(x, time, text)
                assert furthest(got, untouched(x, time, text)) < ROUNDING, (released, t)
        if not released:
            assert sampler.release_weights(to="drop") > 0
    assert sampler.report.programs[0].regions is not None and "mode 'default'" in str(sampler.report)


@pytest.mark.exhaustive  # Inductor takes half a minute for each
@pytest.mark.parametrize("name", ["examples/dit.py", "SD3"])
def test_a_transformer_is_compiled(name: str) -> None:
    c = case(name)
    model: nn.Module = c.model
    sampler = fc.optimize_sampler(model, N_STEPS, timesteps=c.schedule, mode="default")
    for request in (c.call(), c.call()):
        for i in range(0, N_STEPS, 3):
            arguments: dict[str, Any] = c.at(request, i)
            with torch.no_grad():
                got, expected = sampler(**arguments), model(**arguments)
            pairs = [(got, expected)] if isinstance(got, Tensor) else [(got[0], expected[0])]
            assert all(furthest(a, b) < ROUNDING for a, b in pairs)
