"""A sampler explains itself, by its own method and by `fusion_compile.explain` alike."""

from __future__ import annotations

import torch

import fusion_compile as fc
from tests.small_denoiser import X, Y, make


def test_it_gives_the_same_explanation_as_the_function() -> None:
    sampler = make()
    assert "not called yet" in sampler.explain().notes[0]
    sampler(X, torch.ones(2), Y)
    ours, theirs = sampler.explain(), fc.explain(sampler)
    assert isinstance(ours, fc.Explanation)
    assert (ours.title, ours.graphs, ours.hoisting) == (theirs.title, theirs.graphs, theirs.hoisting)
    assert ours.title == "sampler of Denoiser, 1 program"


def test_each_weight_says_whether_its_memory_can_go() -> None:
    sampler = make(example_inputs={"x": X, "timestep": torch.ones(2), "y": Y})
    assert "release_weights() gives its memory back" in sampler.explain().why("time.weight")
    assert "The loop reads it at every step, in linear" in sampler.explain().why("out.weight")
