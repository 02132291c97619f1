"""A run begins from a checkpoint whose fields have other codecs: the numbers are those that were kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._state.named_state import named_state
from fusion_compile._state.other_codecs import _CODED, codecs_differ, in_plain_numbers
from fusion_compile.optim.codecs.all_codecs import CODECS

PAIRS = (("fp32", "int8"), ("int8", "fp32"), ("int8", "4bit"), ("4bit", "bf16"), ("bf16", "4bit"))


def network() -> nn.Sequential:
    """Flat banks of odd lengths, matrices on the spectral path, a convolution and a column."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 128), nn.Linear(128, 128), nn.Conv1d(2, 3, 3), nn.Linear(126, 1))


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


def step_of(make: Callable[..., Any], **codecs: str) -> fc.TrainingStep:
    return fc.compile_training_step(network(), loss_fn, optimizer=make(**codecs), mode="eager", rehearse=False)


def trained(make: Callable[..., Any], **codecs: str) -> fc.TrainingStep:
    step = step_of(make, **codecs)
    source = torch.Generator().manual_seed(1)
    for _ in range(2):
        step(torch.randn(4, 2, 5, generator=source))
    return step


@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("make", [optim.lion, optim.muon, optim.adakaon])
def test_momenta_go_over_into_any_codec(make: Any, before: str, after: str) -> None:
    """The numbers of the checkpoint, encoded once more, but for the last place of a scale; nothing starts at zero."""
    saved = trained(make, momentum=before)
    fresh = step_of(make, momentum=after)
    done = fresh.warm_start(saved.state_dict())
    fields = {name.partition(".")[0] for name in done.fresh}
    assert not {f for f in fields if f.startswith("mu")}
    for key, t in decoded(saved).items():
        wanted = reencoded(t, after, saved, key)
        torch.testing.assert_close(decoded(fresh)[key], wanted, rtol=2**-8 if after == "bf16" else 1e-6, atol=1e-12)
    fresh(torch.ones(4, 2, 5))


def decoded(step: fc.TrainingStep) -> dict[str, Tensor]:
    """``mu`` by full name, as numbers."""
    named = named_state(step._residence.layout, step._state)
    plain = in_plain_numbers(named, {}, step._residence.layout)
    assert not any(_CODED.match(name) for name in plain)
    return {n.partition("mu.")[2]: t.float().clone() for n, t in plain.items() if ".mu." in f".{n}"}


def reencoded(t: Tensor, codec: str, step: fc.TrainingStep, name: str) -> Tensor:
    bank = next(b for b in step._residence.layout.banks for p in b.places if p.name == name)
    shape = (-1,) if bank.matrix is None else (1, *bank.matrix)
    x = t.reshape(shape)
    return CODECS[codec].decode(CODECS[codec].encode(x, None), x).reshape(t.shape)


def test_one_and_the_same_codec_is_carried_bit_for_bit() -> None:
    make = functools.partial(optim.adamw, second_moment="int8")
    saved, fresh = trained(make, momentum="int8"), step_of(make, momentum="int8")
    done = fresh.warm_start(saved.state_dict())
    assert not done.fresh
    kept = [k for k in saved._state if k.startswith("optimizer/")]
    assert kept and all(torch.equal(saved._state[k], fresh._state[k]) for k in kept)


def test_a_second_moment_goes_over_with_its_count() -> None:
    saved, fresh = trained(optim.adamw), step_of(optim.adamw, momentum="int8", second_moment="int8")
    done = fresh.warm_start(saved.state_dict())
    assert {n.partition(".")[0] for n in done.carried} >= {"mu", "nu"}
    assert all(torch.isfinite(t).all() for k, t in fresh._state.items() if k.startswith("optimizer/"))
    assert {n.partition(".")[0] for n in done.fresh} <= {"count", "seed"}  # of the noise


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("fp32", "int8", r"keeps mu as fp32 \(here: int8\)"),
        ("4bit", "int8", r"keeps mu as 4bit \(here: int8\)"),
        ("int8", "fp32", r"keeps mu as int8 \(here: fp32\)"),
        ("bf16", "fp32", r"keeps 0\.mu.* in torch\.bfloat16 \(here: torch\.float32\)"),
    ],
)
def test_loading_another_codec_is_refused_in_one_sentence_by_both_doors(before: str, after: str, words: str) -> None:
    saved, other = trained(optim.lion, momentum=before), step_of(optim.lion, momentum=after)
    at_first = {k: t.clone() for k, t in other._state.items()}
    with pytest.raises(ValueError, match=f"{words}.*step.warm_start"):
        other.load_state_dict(saved.state_dict())
    assert all(torch.equal(t, other._state[k]) for k, t in at_first.items())
    optimizers = []
    for codec in (before, after):
        model = network()
        optimizers.append(optim.Lion(model, momentum=codec, mode="eager"))
        loss_fn(model, torch.ones(4, 2, 5)).backward()
        optimizers[-1].step()
    with pytest.raises(ValueError, match=words):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_another_recipe_is_no_other_codec() -> None:
    t = torch.zeros(2)
    assert codecs_differ({"0.nu.w": t}, {"base.0.mu.mu_int8.w": t, "base.0.mu.mu_int8_scale.w": t}) == ""
    assert codecs_differ({"0.mu.w": t}, {"0.mu.w": t}) == ""
    assert "mu as int8" in codecs_differ({"0.mu.w": t}, {"base.0.mu.mu_int8.w": t})
