"""A generator that only the run held was made inside it."""

from __future__ import annotations

import torch

from fusion_compile._capture.sources.torch_generators import GeneratorsSeen


def test_a_local_generator_was_made_inside_and_a_kept_one_was_not() -> None:
    kept = torch.Generator()

    def draw() -> None:
        torch.randn(2, generator=kept)
        torch.randn(2, generator=torch.Generator())

    with GeneratorsSeen() as seen:
        draw()
    (where,) = seen.made_inside()
    assert where.startswith(__file__)
    assert seen.made_inside() == []


def test_a_samplers_generator_is_the_loaders() -> None:
    with GeneratorsSeen() as seen:
        list(torch.utils.data.RandomSampler(range(3)))
    assert seen.made_inside() == []
