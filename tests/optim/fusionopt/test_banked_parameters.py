"""FusionOpt's computations for each parameter, on a flat bank with padding and on stacked matrices."""

from __future__ import annotations

import torch

from fusion_compile.optim._fusionopt.banked_parameters import BankedParameters, is_stacked
from fusion_compile.optim._transform import BankInfo, Place

FLAT, STACK = "scalar/flat", "spectral/2x2"
INFOS = {
    FLAT: BankInfo((Place("a", (3,), 0), Place("b", (2, 2), 4))),
    STACK: BankInfo((Place("layers.0.w", (2, 2), 0), Place("head.w", (2, 2), 1), Place("layers.7.w", (2, 2), 2))),
}
BANK = torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0, 7.0])


def test_the_role_of_a_key_says_whether_it_is_stacked() -> None:
    assert is_stacked("spectral/4x4/float32") and not is_stacked("scalar/float32")


def test_totals_and_factors_are_those_of_each_parameter() -> None:
    parameters = BankedParameters(INFOS, None)
    assert parameters.count(FLAT, BANK) == 7
    assert parameters.totals(FLAT, BANK).tolist() == [6.0, 22.0]
    assert parameters.scaled(FLAT, BANK, torch.tensor([10.0, 1.0])).tolist()[:3] == [10.0, 20.0, 30.0]
    assert parameters.totals(STACK, torch.ones(3, 2, 2)).flatten().tolist() == [4.0, 4.0, 4.0]


def test_unbound_a_flat_bank_is_one_parameter() -> None:
    parameters = BankedParameters(None, None)
    assert parameters.count(FLAT, BANK) == 8 and float(parameters.totals(FLAT, BANK)) == 28.0
    assert parameters.scaled(FLAT, BANK, torch.tensor(2.0)).tolist() == (2 * BANK).tolist()


def test_samples_begin_anew_with_each_parameter() -> None:
    parameters = BankedParameters(INFOS, None)
    assert parameters.sampled(FLAT, BANK, 2).tolist() == [1.0, 0.0, 3.0, 0.0, 4.0, 0.0, 6.0, 0.0]
    assert BankedParameters(None, None).sampled(FLAT, BANK, 3).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 6.0, 0.0]
    stacked = torch.arange(12.0).view(3, 2, 2)
    assert parameters.sampled(STACK, stacked, 3).tolist() == [[0.0, 3.0], [4.0, 7.0], [8.0, 11.0]]


def test_layer_weights_go_by_the_number_in_the_name() -> None:
    weight = BankedParameters(INFOS, {0: 0.5, 7: 2.0}).layer_weight(STACK, torch.ones(3, 2, 2))
    assert weight is not None and weight.flatten().tolist() == [0.5, 1.0, 2.0]
    assert BankedParameters(INFOS, {3: 0.5}).layer_weight(STACK, torch.ones(3, 2, 2)) is None


def test_tables_made_ahead_change_nothing() -> None:
    ahead = BankedParameters(INFOS, {0: 0.5})
    ahead.make_tables({FLAT: BANK, STACK: torch.ones(3, 2, 2)})
    assert torch.equal(ahead.sampled(FLAT, BANK, 2), BankedParameters(INFOS, {0: 0.5}).sampled(FLAT, BANK, 2))
    assert torch.equal(ahead.totals(FLAT, BANK), torch.tensor([6.0, 22.0]))
