"""The one table of ranges: what it holds, how a name finds its range, and that every recipe's number has one."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

from fusion_compile import optim
from fusion_compile.optim._ranges import RANGES, range_of, refuse_given, refuse_out_of_range

NUMBERS_OF_ALL: dict[str, Any] = {
    **{name: number for make in optim.RECIPES.values() for name, number in make().hyperparameters.items()},
    **optim.fusion(
        ("ns5", "normuon", "sf", "mona", "snr", "autoscale"), mona_alpha=-50.0, step_size="loss_ratio"
    ).hyperparameters,
    **optim.fusion(("ns5", "sf"), step_size="polyak", layer_weights={3: 0.5}).hyperparameters,
    **optim.fusionopt_compat().hyperparameters,
    **optim.clip_by_global_norm(1.0).hyperparameters,
}


@pytest.mark.parametrize("name", NUMBERS_OF_ALL)
def test_every_number_of_the_package_has_a_range_and_its_default_lies_in_it(name: str) -> None:
    found = range_of(name)
    assert found is not None and found.holds(float(NUMBERS_OF_ALL[name]))


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("head_lr", "lr"),
        ("scalar_beta1", "beta1"),
        ("no_decay.weight_decay", "weight_decay"),
        ("group0.scalar_eps", "eps"),
        ("polyak_weight_decay", "weight_decay"),
        ("layer_weight.11", "layer_weight"),
        ("deep.layer_weight.11", "layer_weight"),
        ("schedule_free_beta", "schedule_free_beta"),
        ("snr_beta", "snr_beta"),
    ],
)
def test_a_number_with_a_prefix_has_the_range_of_what_it_ends_in(name: str, of: str) -> None:
    assert range_of(name) is RANGES[of]


@pytest.mark.parametrize("name", ["temperature", "alr", "epsilon", "lr_scaling", "betas"])
def test_a_name_that_only_looks_alike_has_none(name: str) -> None:
    assert range_of(name) is None
    refuse_out_of_range(name, -1.0)


WRONG: list[tuple[str, float, str]] = [
    ("lr", -1.0, r"'lr' is -1\.0, but a negative rate goes uphill.* Give a finite number of at least 0\.$"),
    ("lr", math.inf, "infinite"),
    ("lr", math.nan, "'lr' was given nan"),
    ("weight_decay", -1e-9, "a negative decay makes weights grow"),
    ("eps", -1.0, "added to a root"),
    ("momentum", -1.0, "Give 0 to 1, 1 excluded"),
    ("momentum", 1.0, "Give 0 to 1, 1 excluded"),
    ("beta2", 1.5, "the decay of an average lies below 1"),
    ("scalar_beta1", 1.0, "'scalar_beta1' is 1.0"),
    ("schedule_free_beta", 1.01, r"Give 0 to 1\.$"),
    ("clip_grad_norm", -1.0, "Give a number of at least 0, or inf for none"),
    ("mona_alpha", math.inf, "Give a finite number"),
    ("autoscale_growth", 0.99, "the estimated distance would shrink"),
]


@pytest.mark.parametrize(("name", "number", "words"), WRONG)
def test_a_number_outside_is_refused_with_its_reason_and_what_is_needed(name: str, number: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_out_of_range(name, number)
    with pytest.raises(ValueError, match=words):
        refuse_given(name, number)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("lr", 0.0),
        ("eps", 0.0),
        ("beta1", 0.0),
        ("schedule_free_beta", 1.0),
        ("max_norm", math.inf),
        ("mona_alpha", -50),
    ],
)
def test_the_ends_that_mean_something_are_inside(name: str, number: float) -> None:
    refuse_out_of_range(name, number)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(optim.adamw, lr=-1.0),
        functools.partial(optim.adamw, lr=math.nan),
        functools.partial(optim.adamw, eps=-1.0),
        functools.partial(optim.adamw, betas=(1.5, 0.9)),
        functools.partial(optim.adamw, weight_decay=-0.1),
        functools.partial(optim.adamw, lr=optim.Named("speed", -1.0)),
        functools.partial(optim.adamw, lr=optim.linear(1e-3, 100, final=-1e-3)),
        functools.partial(optim.lion, betas=(0.9, 1.0)),
        functools.partial(optim.muon, momentum=-1.0),
        functools.partial(optim.muon, scalar_lr=-1.0),
        functools.partial(optim.normuon, betas=(0.95, 1.0)),
        functools.partial(optim.sf_adamw, betas=(1.1, 0.9)),
        functools.partial(optim.sf_normuon, weight_decay=math.inf),
        functools.partial(optim.soap, shampoo_beta=1.0),
        functools.partial(optim.full_fusion, lr=math.inf),
        functools.partial(optim.fusionopt_compat, beta_p=-0.1),
        functools.partial(optim.autoscale, optim.adamw(), growth=0.5),
        functools.partial(optim.snr_gate, optim.scale_by_adam(), floor=2.0),
        functools.partial(optim.scale_by_layer, {0: -1.0}),
        functools.partial(optim.normalize_neurons, eps=-1.0),
        functools.partial(optim.scale_by_soap, eps=-1.0),
        functools.partial(optim.scale_by_kl_soap, eps=-1.0),
        functools.partial(optim.scale_by_kl_shampoo, eps=-1.0),
        functools.partial(optim.fusionopt_compat, snr_power=-1.0),
    ],
    ids=lambda make: f"{make.func.__name__}({list(make.keywords.items()) or make.args})",
)
def test_a_factory_refuses_it_at_once(make: Any) -> None:
    with pytest.raises(ValueError, match=r"(is (-|inf|1|2|0)|was given nan)"):
        make()
    assert make.func(*make.args[:1] if make.func is not optim.scale_by_layer else ({},)) is not None


def test_an_end_of_a_schedule_is_looked_at_before_the_run_reaches_it() -> None:
    falling = optim.cosine(3e-4, total_steps=1000, final=-1e-6)
    with pytest.raises(ValueError, match=r"'lr' \(whose schedule .*total_steps=1000.* has this final\) is -1e-06, but"):
        refuse_given("lr", falling)
    with pytest.raises(ValueError, match=r"'momentum' \(whose schedule .* has this value\) is 1\.0, but"):
        refuse_given("momentum", optim.constant(1.0, warmup_steps=10))
    refuse_given("lr", lambda step: -1.0)  # a callable of the user's is called when its value is used
