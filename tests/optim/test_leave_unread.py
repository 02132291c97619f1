"""`leave_unread`: the same optimizer, with numbers that each parameter has for itself."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from fusion_compile._state import flat_tree
from fusion_compile.optim._transform import BankInfo, Place, bound
from tests.optim.walks import Walk

BANKS = {"scalar/float32": torch.zeros(12), "spectral/3x2/float32": torch.zeros(2, 3, 2)}


@pytest.mark.parametrize("name", ["adamw", "lion", "sf_adamw", "adopt", "muon", "sf_normuon"])
def test_where_all_are_read_it_is_the_same_optimizer(name: str) -> None:
    base = optim.create(name)
    plain, left = Walk(base, BANKS), Walk(optim.leave_unread(base), BANKS)
    for _ in range(3):
        gradients = {key: torch.randn_like(bank) for key, bank in BANKS.items()}
        torch.testing.assert_close(left(gradients), plain(gradients))
    assert optim.leave_unread(base).extras.leaves_unread and not base.extras.leaves_unread


def test_a_flat_bank_keeps_a_number_for_as_many_entries_as_all_places_allow() -> None:
    places = (Place("a", (3,), 0), Place("b", (4,), 4), Place("c", (1,), 8))
    whole = bound(optim.leave_unread(optim.adamw(1e-2)), {"scalar/float32": BankInfo(places)})
    state = dict(flat_tree.flatten(whole.init({"scalar/float32": torch.zeros(12)})))
    sizes = {path: tensor.shape for path, tensor in state.items() if "power" in path}
    assert len(sizes) == 2 and set(sizes.values()) == {(3,)}
    assert all(path.endswith("/by_bank/scalar/float32") for path in sizes)


@pytest.mark.parametrize(("name", "reason"), [("prodigy", "of all parameters"), ("soap", "every 10 steps")])
def test_an_optimizer_that_pools_or_works_now_and_then_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        optim.leave_unread(optim.create(name))
