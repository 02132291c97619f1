"""AdaPNM's direction: the averages take turns, and eps is where its docstring says."""

from typing import Any

import pytest
import torch

import fusion_compile as fc
from fusion_compile import optim
from tests.data.bowl import Bowl, loss_fn, noise, start_of, trace
from tests.data.official_adapnm import AdaPNMCase
from tests.optim.walks import Walk, keeps_the_laws


def test_the_averages_take_turns() -> None:
    walk = Walk(optim.scale_by_adapnm((0.8, 0.9)), {"b": torch.zeros(3, dtype=torch.float64)})
    first, second, third = (torch.randn(3, dtype=torch.float64) for _ in range(3))
    walk({"b": first})
    a = 0.36 * first
    torch.testing.assert_close(walk.state.mu["b"], a)
    walk({"b": second})
    b = 0.36 * second
    torch.testing.assert_close(walk.state.mu["b"], b)
    torch.testing.assert_close(walk.state.mu_before["b"], a)
    nu = 0.9 * (0.9 * 0.1 * first**2 + 0.1 * second**2) + 0.1 * third**2
    a = 0.64 * a + 0.36 * third
    wanted = (1.5 * a - 0.5 * b) / 2.5**0.5 * (1 - 0.9**3) ** 0.5 / nu.sqrt()
    torch.testing.assert_close(walk({"b": third})["b"], wanted)


@pytest.mark.parametrize("updates", [(1, 2, 5, 20), pytest.param((120,), marks=pytest.mark.exhaustive)])
def test_the_authors_own_is_among_its_options(updates: tuple[int, ...]) -> None:
    """Within 3·floor + 2e-5 + 1e-7/‖displacement‖ of their code, AMSGrad included."""
    options: dict[str, Any] = {"eps": 1e-8, "momentum": "fp32", "is_cautious": False, "centralize": False}
    whole = optim.adapnm(
        1e-3, (0.9, 0.999), beta0=1.0, clip_threshold=float("inf"), factored=False, amsgrad=True, **options
    )
    case, model = AdaPNMCase(), Bowl()
    start = start_of(model)
    step = fc.compile_training_step(model, loss_fn, optimizer=whole, mode="eager")
    for update in range(1, max(updates) + 1):
        step(*noise(update - 1))
        if update in updates:
            found = trace({n: p.detach() for n, p in model.named_parameters()}, start)
            far = {n: ratio for n, ratio in case.ratios(update, "y", found).items() if not ratio <= 1}
            assert not far, (update, far)


def test_laws() -> None:
    whole = optim.chain(optim.scale_by_adapnm(), optim.clip_update_rms(), optim.scale_by_learning_rate(1e-3))
    keeps_the_laws(whole, {"matrix/a": torch.randn(3, 8, 5), "scalar/b": torch.randn(7)})
    with pytest.raises(ValueError, match="added to squares"):
        optim.scale_by_adapnm(eps=-1.0)
