"""The bound on each parameter's root mean square, in stacked banks and in flat ones."""

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim._transform import bound
from tests.optim.walks import Walk, flat_bank


def test_each_matrix_and_each_parameter_of_a_flat_bank_has_its_own_bound() -> None:
    big, small = 3 * torch.ones(4, 5), 0.5 * torch.ones(4, 5)
    found = Walk(optim.clip_update_rms(2.0), {"m": torch.zeros(2, 4, 5)})({"m": torch.stack([big, small])})["m"]
    assert torch.equal(found, torch.stack([2 * torch.ones(4, 5), small]))
    banks, info, back = flat_bank({"a": 4 * torch.ones(6), "b": -0.5 * torch.ones(3)})
    whole = bound(optim.clip_update_rms(1.0), {"scalar/flat": info})
    moved = back(Walk(whole, {k: torch.zeros_like(b) for k, b in banks.items()})(banks)["scalar/flat"])
    assert torch.equal(moved["a"], torch.ones(6)) and torch.equal(moved["b"], -0.5 * torch.ones(3))


def test_zeros_stay_and_no_bound_at_all_is_refused() -> None:
    zeros = {"m": torch.zeros(2, 3)}
    assert torch.equal(Walk(optim.clip_update_rms(), dict(zeros))(zeros)["m"], zeros["m"])
    with pytest.raises(ValueError, match="must be above 0"):
        optim.clip_update_rms(0.0)
