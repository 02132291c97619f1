"""The authors' AdaMuon: their trajectory while it is not chaotic, and the size of its updates."""

import torch

import fusion_compile as fc
from fusion_compile import optim
from tests.data.bowl import Bowl, loss_fn, noise, start_of, trace
from tests.data.official_adamuon import AdaMuonCase
from tests.optim.walks import Walk


def test_it_follows_the_authors_for_five_updates() -> None:
    """Afterwards a sign of a momentum near zero differs, and all else with it (the floors say so: 0.1 at 120)."""
    case, model = AdaMuonCase(), Bowl()
    start = start_of(model)
    whole = optim.adamuon_sign(0.02, matmul_dtype=torch.float32, scalar_lr=1e-3)
    step = fc.compile_training_step(model, loss_fn, optimizer=whole, mode="eager")
    for update in range(1, 6):
        step(*noise(update - 1))
        if update in (1, 2, 5):
            found = trace({n: p.detach() for n, p in model.named_parameters()}, start)
            far = {n: r for n, r in case.ratios(update, "y", found).items() if not r <= 1}
            assert not far, (update, far)


def test_an_update_has_root_mean_square_a_fifth_of_lr() -> None:
    params = {"spectral/a": torch.randn(2, 16, 24), "scalar/b": torch.randn(5)}
    walk = Walk(optim.adamuon_sign(0.1, weight_decay=0.0, matmul_dtype=torch.float32), params)
    moved = walk({k: torch.randn_like(p) for k, p in params.items()})["spectral/a"]
    torch.testing.assert_close(moved.square().mean((1, 2)).sqrt(), torch.full((2,), 0.02), rtol=1e-4, atol=0)
