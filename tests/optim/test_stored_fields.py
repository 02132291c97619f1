"""Fields of a transform's state by name."""

import torch

from fusion_compile import optim
from fusion_compile.optim._stored_fields import fields_of, is_banked, replaced

BANKS = {"spectral/8x8": torch.zeros(1, 8, 8), "scalar": torch.zeros(16)}


def test_tensors_and_numbers_are_told_apart() -> None:
    assert fields_of(optim.adamw().init(BANKS), BANKS) == (["mu", "nu"], ["beta1_power", "beta2_power"])
    tensors, numbers = fields_of(optim.sf_normuon().init(BANKS), BANKS)
    assert tensors == ["z", "mu", "nu"] and set(numbers) == {"lr_max", "weight_sum", "beta2_power"}
    assert fields_of(optim.chain(optim.scale_by_lion()).init({}), BANKS) == ([], [])


def test_only_named_fields_are_replaced_and_paths_say_where() -> None:
    state = optim.sf_normuon().init(BANKS)
    seen = []

    def replace(path: str, field: str, content: object) -> object:
        seen.append((path, field))
        return "here"

    after = replaced(state, {"mu"}, replace)
    assert seen == [("/spectral/base/0/mu", "mu")]
    assert after["spectral"].base[0].mu == "here"
    assert after["spectral"].z is state["spectral"].z or torch.equal(
        after["spectral"].z["spectral/8x8"], state["spectral"].z["spectral/8x8"]
    )


def test_what_has_the_form_of_banks() -> None:
    assert is_banked({"scalar": torch.zeros(16)}, BANKS)
    assert not is_banked({}, BANKS)
    assert not is_banked({"scalar": torch.zeros(())}, BANKS)
    assert not is_banked({"other": torch.zeros(3)}, BANKS)
    assert not is_banked(torch.zeros(3), BANKS)
