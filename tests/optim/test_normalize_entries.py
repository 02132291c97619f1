"""AdaMuon's second moment: by hand, and the size of every result."""

import torch

from fusion_compile import optim
from tests.optim.walks import Walk, a_bank_moves_as_its_members


def test_by_hand() -> None:
    walk = Walk(optim.normalize_entries(0.9, eps=0.0), {"w": torch.zeros(2, 3, 4, dtype=torch.float64)})
    nu = torch.zeros(2, 3, 4, dtype=torch.float64)
    for _ in range(3):
        o = torch.randn(2, 3, 4, dtype=torch.float64)
        nu = 0.9 * nu + 0.1 * o * o
        u = o / nu.sqrt()
        found = walk({"w": o})["w"]
        torch.testing.assert_close(found, 0.2 * u / u.square().mean((1, 2), keepdim=True).sqrt())
    a_bank_moves_as_its_members(lambda: optim.chain(optim.normalize_entries(), optim.scale_by_learning_rate(0.1)))
