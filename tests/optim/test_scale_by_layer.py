"""A weight for each layer, in stacked and in flat banks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusion_compile.optim import Named, chain, constant, scale_by_learning_rate
from fusion_compile.optim._transform import BankInfo, BankInfos, Place, bound
from fusion_compile.optim.scale_by_layer import scale_by_layer
from tests.optim.walks import Walk, flat_bank, keeps_the_laws, nodes

KEY, FLAT = "spectral/4x3", "scalar/flat"


def model(depth: int) -> tuple[dict[str, torch.Tensor], BankInfos, Callable[[torch.Tensor], dict[str, torch.Tensor]]]:
    """An embedding, `depth` blocks of two matrices, a norm's gain and a bias, and a head's bias."""
    matrices = ["embed.weight", *(f"net.blocks.{i}.{m}.weight" for i in range(depth) for m in ("qkv", "out"))]
    vectors = ["embed.bias", *(f"net.blocks.{i}.{v}" for i in range(depth) for v in ("norm.gain", "out.bias")), "head"]
    flat, flat_facts, back = flat_bank({n: torch.ones(5 if n.endswith("gain") else 3) for n in vectors})
    members = tuple(Place(n, (4, 3), i) for i, n in enumerate(matrices))
    banks = {KEY: torch.ones(len(matrices), 4, 3), **flat}
    return banks, {KEY: BankInfo(members[::-1]), FLAT: flat_facts}, back


def test_every_parameter_of_a_listed_layer_is_scaled_and_no_other() -> None:
    banks, facts, back = model(4)
    walk = Walk(bound(scale_by_layer({1: 0.5, 3: 0.0}), facts), banks)
    updates = walk({k: torch.ones_like(b) for k, b in banks.items()})
    # The embedding, then two matrices a block.
    assert updates[KEY][:, 0, 0].tolist() == [1, 1, 1, 0.5, 0.5, 1, 1, 0, 0]
    assert torch.equal(updates[KEY], updates[KEY][:, :1, :1].expand(-1, 4, 3))
    for name, u in back(updates[FLAT]).items():
        wanted = 0.5 if ".1." in name else 0.0 if ".3." in name else 1.0
        assert u.tolist() == [wanted] * u.numel(), name


def test_a_layer_of_ten_is_not_the_layer_one() -> None:
    banks, facts, _ = model(12)
    updates = Walk(bound(scale_by_layer({1: 2.0}), facts), banks)({k: torch.ones_like(b) for k, b in banks.items()})
    assert updates[KEY][:, 0, 0].tolist() == [1, 1, 1, 2, 2, *[1] * 20]


def test_weights_are_live_under_their_own_names() -> None:
    banks, facts, _ = model(2)
    transform = bound(scale_by_layer({0: 0.5, 1: Named("last", constant(2.0, warmup_steps=4))}), facts)
    assert dict(transform.hyperparameters) == {"layer_weight.0": 0.5, "last": constant(2.0, warmup_steps=4)}
    walk = Walk(transform, banks)
    ones = {k: torch.ones_like(b) for k, b in banks.items()}
    assert walk(ones)[KEY][:, 0, 0].tolist() == [1, 0.5, 0.5, 0.5, 0.5]
    assert walk(ones, **{"layer_weight.0": 3.0, "last": 0.0})[KEY][:, 0, 0].tolist() == [1, 3, 3, 0, 0]


def test_it_is_the_identity_before_it_is_bound_and_on_banks_without_listed_layers() -> None:
    banks, facts, _ = model(2)
    grads = {k: torch.randn_like(b) for k, b in banks.items()}
    unbound = Walk(scale_by_layer({0: 0.5}), banks)(grads)
    assert all(torch.equal(unbound[k], g) for k, g in grads.items())
    half = Walk(bound(scale_by_layer({0: 0.5}), {KEY: facts[KEY]}), banks)(grads)
    assert torch.equal(half[FLAT], grads[FLAT]) and not torch.equal(half[KEY], grads[KEY])
    assert bound(scale_by_layer({0: 0.5}), {}).hyperparameters  # a role without parameters


def test_another_pattern() -> None:
    facts = {"w": BankInfo(tuple(Place(f"encoder.stage{i}.weight", (2, 2), i) for i in range(3)))}
    walk = Walk(bound(scale_by_layer({2: 0.0}, r"stage(\d+)"), facts), {"w": torch.ones(3, 2, 2)})
    assert walk({"w": torch.ones(3, 2, 2)})["w"][:, 0, 0].tolist() == [1, 1, 0]


def test_laws() -> None:
    banks, facts, _ = model(4)
    chained = chain(scale_by_layer({1: 0.5}), scale_by_learning_rate(0.1))
    assert chained.bind is not None
    for dtype in (torch.float32, torch.float64):
        keeps_the_laws(chained.bind(facts), {k: b.to(dtype) for k, b in banks.items()})
        keeps_the_laws(chained, {k: b.to(dtype) for k, b in banks.items()})

    def count(depth: int) -> int:
        banks, facts, _ = model(depth)
        return nodes(bound(scale_by_layer({1: 0.5, 2: 2.0}), facts), banks)

    assert count(4) == count(28) > 4


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda facts: scale_by_layer({0: 1.0}, r"layers\.\d+"), r"has no group; the layer's number is its first"),
        (lambda facts: bound(scale_by_layer({1: 0.5, 7: 0.5}), facts), r"lists layer 7, but .* are 0, 1, 2, 3;"),
        (lambda facts: bound(scale_by_layer({1: 0.5}, r"stage(\d+)"), facts), r"are none \(the names look like net"),
    ],
)
def test_refusals(build: Callable[[BankInfos], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(model(4)[1])
