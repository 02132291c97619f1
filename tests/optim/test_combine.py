"""`chain`, `named_chain` and `partition`: what goes where, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusion_compile import optim
from fusion_compile._state.flat_tree import flatten
from fusion_compile._types import Tensors
from fusion_compile.optim import Named, Transform
from fusion_compile.optim.clip_by_global_norm import clip_factor
from tests.optim.one_tensor import G1, G2, P, Walk, context, same, sgd


def test_chain_refuses_nothing_at_all_and_two_gradient_points() -> None:
    with pytest.raises(ValueError, match="at least one transform"):
        optim.chain()
    with pytest.raises(ValueError, match=r"schedule_free\(a\), schedule_free\(b\) both move the point"):
        optim.chain(*(optim.schedule_free(optim.chain(sgd(), name=name), 0.1) for name in "ab"))


def test_a_chain_passes_on_the_gradient_point_of_its_one_mover() -> None:
    chained = optim.chain(optim.clip_by_global_norm(1e9), optim.schedule_free(sgd(), 0.1))
    plain, clipped = Walk(optim.schedule_free(sgd(), 0.1)), Walk(chained)
    for g in (G1, G2):
        plain(g)
        clipped(g)
    same(clipped.y(), plain.y())
    assert float((clipped.y() - clipped.p).abs().max()) > 0.01


def test_one_name_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"'lr' is declared twice with different values \(0\.1 and 0\.2\).*scalar_lr"):
        optim.partition({"spectral": sgd(0.1), "scalar": sgd(0.2)})
    with pytest.raises(ValueError, match="'weight_decay' is declared twice"):
        optim.chain(optim.add_decayed_weights(0.1), optim.add_decayed_weights(0.3))
    shared = optim.partition({"spectral": sgd(0.1), "scalar": optim.scale_by_learning_rate(0.1)})
    assert shared.hyperparameters == {"lr": 0.1}
    apart = optim.partition({"spectral": sgd(0.1), "scalar": optim.scale_by_learning_rate(Named("scalar_lr", 0.2))})
    assert apart.hyperparameters == {"lr": 0.1, "scalar_lr": 0.2}


def test_partition_sends_each_bank_to_its_role_and_keeps_the_order() -> None:
    halves = optim.partition({"spectral": sgd(0.1), "scalar": optim.scale_by_learning_rate(Named("scalar_lr", 0.2))})
    banks = {"scalar/a": P, "spectral/b": P, "scalar/c": G1}
    updates, _ = halves.update(banks, halves.init(banks), banks, context(halves))
    assert list(updates) == list(banks) and halves.roles == ("spectral", "scalar")
    wanted: Tensors = {"scalar/a": -0.2 * P, "spectral/b": -0.1 * P, "scalar/c": -0.2 * G1}
    for key, u in wanted.items():
        same(updates[key], u)


def test_partition_leaves_the_gradient_point_of_a_part_without_one_where_it_is() -> None:
    mixed = optim.partition({"spectral": optim.schedule_free(sgd(), 0.1), "scalar": sgd()})
    params: Tensors = {"scalar/a": P, "spectral/b": P}
    state = mixed.init(params)
    for g in (G1, G2):
        updates, state = mixed.update(dict.fromkeys(params, g), state, params, context(mixed))
        params = {key: p + updates[key] for key, p in params.items()}
    assert mixed.gradient_point is not None
    point = mixed.gradient_point(params, state, context(mixed))
    assert list(point) == list(params)
    assert torch.equal(point["scalar/a"], params["scalar/a"])
    assert not torch.equal(point["spectral/b"], params["spectral/b"])


def test_a_bank_of_an_unknown_role_is_refused() -> None:
    with pytest.raises(
        ValueError, match="bank 'expert/4x4' has no transform; partition\\(\\) was given spectral, scalar"
    ):
        optim.partition({"spectral": sgd(), "scalar": sgd()}).init({"expert/4x4": P})


def test_two_steps_in_one_chain_are_refused() -> None:
    with pytest.raises(ValueError, match="adamw and scale_by_learning_rate both take a step in one chain"):
        optim.chain(optim.adamw(0.1), optim.scale_by_learning_rate(0.1))
    scaled = optim.chain(optim.adamw(0.1), optim.scale_by_layer({}))
    assert scaled.descends and scaled.name == "chain(adamw, scale_by_layer)"


SIGNED = Transform(
    lambda params: optim.EmptyState(),
    lambda u, state, params, context: ({k: t.sign() for k, t in u.items()}, state),
    optim.Extras("signed"),
)


@pytest.mark.parametrize(
    "part",
    [
        optim.add_decayed_weights(0.1),
        optim.scale_by_adam(),
        optim.orthogonalize(),
        optim.chain(optim.scale_by_layer({}), optim.scale_by_momentum(0.9)),
        optim.partition({"scalar": optim.scale_by_rms()}),
        optim.measured(optim.scale_by_momentum(0.9), "size"),
        optim.snr_gate(optim.scale_by_layer({})),
        SIGNED,
    ],
    ids=lambda part: part.name,
)
def test_a_part_that_needs_directions_cannot_follow_the_step(part: Transform) -> None:
    step = optim.scale_by_learning_rate(0.1)
    words = rf"^{re.escape(part.name)} follows scale_by_learning_rate, .*Put {re.escape(part.name)} before"
    for parts in ((step, part), (optim.scale_by_momentum(0.5), step, optim.scale_by_layer({}), part)):
        with pytest.raises(ValueError, match=words):
            optim.chain(*parts)
        with pytest.raises(ValueError, match=words):
            optim.named_chain(*((f"part{i}", part) for i, part in enumerate(parts)))
    assert optim.chain(part, step).descends


def test_a_part_that_takes_updates_may_follow_the_step() -> None:
    step, params = optim.scale_by_learning_rate(0.5), {"w": P}
    clip = optim.clip_by_global_norm(1.0)
    bounded = optim.chain(step, optim.measured(optim.chain(clip, optim.scale_by_layer({})), "size"))
    assert bounded.descends and not bounded.after_step and optim.chain(clip, optim.scale_by_shape()).after_step
    updates, _ = bounded.update({"w": G1}, bounded.init(params), params, context(bounded))
    assert torch.equal(updates["w"], -0.5 * G1 * clip_factor((0.5 * G1).norm(), torch.tensor(1.0)))
    signed = optim.chain(step, SIGNED.with_extras(after_step=True))
    assert torch.equal(signed.update({"w": G1}, signed.init(params), params, context(signed))[0]["w"], -G1.sign())


def test_nothing_follows_a_part_that_averages() -> None:
    average = optim.schedule_free(sgd(), 0.1)
    with pytest.raises(ValueError, match=r"scale_by_layer follows schedule_free\(.*\) in one chain, .*into the part"):
        optim.chain(average, optim.scale_by_layer({}))


def test_a_partition_of_which_one_part_takes_no_step_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"scale_by_soap, the transform of 'spectral', takes no step, but that of 'scalar' does; 'spectral' would",
    ):
        optim.partition({"scalar": optim.adamw(), "spectral": optim.scale_by_soap()})
    directions = optim.partition({"spectral": optim.scale_by_soap(), "scalar": optim.scale_by_adam((0.95, 0.95))})
    assert not directions.descends
    assert optim.chain(directions, optim.scale_by_learning_rate(0.1)).descends
    with pytest.raises(ValueError, match="at least one transform"):
        optim.partition({})


def named(*names: str) -> Transform:
    parts = [optim.scale_by_momentum(0.5), optim.add_decayed_weights(0.5), optim.scale_by_learning_rate(0.25)]
    return optim.named_chain(*zip(names, parts, strict=True))


def test_a_named_chain_is_the_chain_with_names_in_its_state() -> None:
    plain = optim.chain(
        optim.scale_by_momentum(0.5), optim.add_decayed_weights(0.5), optim.scale_by_learning_rate(0.25)
    )
    walks = Walk(named("mean", "decay", "step")), Walk(plain)
    for g in (G1, G2):
        assert torch.equal(*(walk(g) for walk in walks))
    assert list(walks[0].state) == ["mean", "decay", "step"]
    assert [path for path, _ in flatten(walks[0].state, "optimizer")] == ["optimizer/mean/mu/w"]
    assert named("mean", "decay", "step").name == "named_chain(mean, decay, step)"
    assert named("mean", "decay", "step").hyperparameters == plain.hyperparameters


def test_a_named_chain_lifts_periodic_work_diagnostics_and_binding() -> None:
    transform = optim.named_chain(
        ("whiten", optim.scale_by_shampoo(every=2)),
        ("step", optim.schedule_free(optim.scale_by_learning_rate(0.1), 0.1)),
    )
    params = {"spectral/3x4": torch.randn(3, 4, dtype=torch.float64)}
    state = transform.init(params)
    _, state = transform.update(params, state, params, context(transform))
    (work,) = transform.periodic
    renewed = work.update(state, params, context(transform))
    assert list(renewed) == ["whiten", "step"] and renewed["step"] is state["step"]
    assert not torch.equal(renewed["whiten"].left_root["spectral/3x4"], state["whiten"].left_root["spectral/3x4"])
    assert transform.diagnostics is not None and set(transform.diagnostics(state)) == {"comp/shampoo_gain"}
    assert transform.gradient_point is not None
    point = transform.gradient_point(params, state, context(transform))["spectral/3x4"]
    same(point, 0.9 * params["spectral/3x4"] + 0.1 * state["step"].z["spectral/3x4"])
    cut = optim.named_chain(("shape", optim.scale_by_shape())).bind
    assert cut is not None
    halves = cut({"w": optim.BankInfo((), optim.Blocks((4, 4)))})
    tall = {"w": torch.ones(8, 1, dtype=torch.float64)}
    assert halves.update(tall, halves.init(tall), tall, context(halves))[0]["w"].flatten().tolist() == [2.0] * 8


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ([], ValueError, "at least one"),
        ([("a", optim.scale_by_mona()), ("a", optim.scale_by_mona())], ValueError, "two parts named 'a'"),
        ([("a/b", optim.scale_by_mona())], ValueError, r"cannot name a part 'a/b'; give a string without '/' and '\.'"),
        ([("a.b", optim.scale_by_mona())], ValueError, r"cannot name a part 'a\.b'"),
        ([("", optim.scale_by_mona())], ValueError, "cannot name a part ''"),
        ([(1, optim.scale_by_mona())], ValueError, "cannot name a part 1"),
        ([optim.scale_by_mona()], TypeError, "was given the transform scale_by_mona without a name; give pairs"),
        ([("a", "adam")], TypeError, r"was given \('a', 'adam'\); give pairs"),
    ],
)
def test_names_that_would_not_make_a_path_are_refused(parts: list[Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        optim.named_chain(*parts)


def test_a_factory_that_was_not_called_is_noticed() -> None:
    with pytest.raises(TypeError, match=r"chain\(\), part 1, was given a function, not a Transform; call it: adamw\("):
        optim.chain(optim.scale_by_mona(), optim.adamw)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"partition\(\), role 'scalar', was given a str, not a Transform\.$"):
        optim.partition({"scalar": "adamw"})  # type: ignore[dict-item]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "cautious": optim.cautious,
    "snr_gate": optim.snr_gate,
    "autoscale": optim.autoscale,
    "scale_lr_by_loss_ratio": optim.scale_lr_by_loss_ratio,
    "schedule_free": lambda base: optim.schedule_free(base, 1e-3),
    "schedule_free_plus": optim.schedule_free_plus,
    "measured": lambda base: optim.measured(base, "size"),
    "scale_by_shampoo": lambda base: optim.scale_by_shampoo(base=base),
    "scale_by_kl_shampoo": lambda base: optim.scale_by_kl_shampoo(base=base),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_no_transform_cannot_be_wrapped(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\(\), base, was given a str, not a Transform\.$"):
        WRAPPERS[name]("adamw")
    with pytest.raises(TypeError, match=rf"^{name}\(\), base, was given a function, .*; call it: adamw\(…\)\.$"):
        WRAPPERS[name](optim.adamw)


def test_what_is_no_dictionary_cannot_be_a_partition() -> None:
    with pytest.raises(TypeError, match=r"partition\(\) was given a list; give a dictionary by role"):
        optim.partition([optim.adamw()])  # type: ignore[arg-type]
