"""A sampler's compiled body writes each kind of block once, at any depth; the eager body stays as it was traced."""

from __future__ import annotations

import pytest
import torch
from dit import DiT

from fusion_compile.sampler import Sampler, optimize_sampler

X, T, Y = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5), torch.tensor([1, 2])


def sampler_of(depth: int, **options: object) -> Sampler:
    model = DiT(input_size=8, hidden_size=32, depth=depth, num_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return optimize_sampler(model.eval(), 2, timesteps=torch.tensor([0.5, 1.0]), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [3, 6])
def test_a_block_is_compiled_once_and_called_for_each_layer(depth: int) -> None:
    sampler = sampler_of(depth, backend="aot_eager", mode="default")
    with torch.no_grad():
        torch.testing.assert_close(sampler(X, T, Y), sampler.model(X, T, Y))  # AOTAutograd decomposes some operators
    assert f"repeated    1 blocks compiled once each, called {depth} times a step" in str(sampler.report)


def test_weights_written_in_place_reach_every_call_of_a_block() -> None:
    """They are inputs of the region, not constants in it."""
    sampler = sampler_of(3, backend="aot_eager", mode="default")
    with torch.no_grad():
        sampler(X, T, Y)
        for block in sampler.model.get_submodule("blocks").children():
            block.get_parameter("attn.qkv.weight").mul_(1.5)
        torch.testing.assert_close(sampler(X, T, Y), sampler.model(X, T, Y))


def test_the_eager_body_is_not_folded() -> None:
    sampler = sampler_of(3, mode="eager")
    with torch.no_grad():
        assert torch.equal(sampler(X, T, Y), sampler.model(X, T, Y))
    assert "repeated" not in str(sampler.report)
