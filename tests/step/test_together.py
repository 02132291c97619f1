"""Tests: how a step on several ranks is made."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from fusion_compile._step.planned import Forced, plan_update
from fusion_compile._step.together import _form, contents
from tests.ranks import programs as P


def test_a_number_for_the_bits_of_each_tensor() -> None:
    one = {"a": torch.randn(3, 2), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    other = {name: t.clone() for name, t in one.items()}
    assert contents(one) == contents(other)
    other["b"][0] = 1.0078125  # the next bf16 number
    assert [name for name in one if contents(one)[name] != contents(other)[name]] == ["b"]


def planned(optimizer: object) -> object:
    return plan_update(P.net(), optimizer, None, (), None, Forced(spectral=P.SPECTRAL))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["muon", "sf_normuon", "soap", "full_fusion"])
def test_matrices_that_are_updated_apart_are_divided(optimizer: str) -> None:
    assert _form(planned(optimizer), None) == "optimizer"  # type: ignore[arg-type]


def test_an_optimizer_that_says_that_it_pools_is_replicated() -> None:
    pools = optim.chain(optim.clip_by_global_norm(1.0), optim.muon())
    assert _form(planned(pools), None) == "replicate"  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="the norm of all gradients would need the parts of all ranks"):
        assert _form(planned(pools), "optimizer") == "replicate"  # type: ignore[arg-type]


def test_one_that_pools_without_saying_so_is_refused_by_name_and_replicated_by_default() -> None:
    def update(updates, state, params, context):
        mean = torch.stack([u.abs().mean() for u in updates.values()]).mean()
        return {key: u / mean for key, u in updates.items()}, state

    silent = optim.Transform(lambda params: optim.EmptyState(), update, optim.Extras(name="by_the_mean"))
    pools = optim.chain(silent, optim.muon())
    with pytest.raises(ValueError, match=r"shard='optimizer' with .*does not say that it pools"):
        _form(planned(pools), "optimizer")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="each rank keeps the whole state"):
        assert _form(planned(pools), None) == "replicate"  # type: ignore[arg-type]
