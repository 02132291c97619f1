"""`chain`, `named_chain` and `partition`: what goes where, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from fusion_compile._types import Tensors
from fusion_compile.optim import Named
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
