"""Schedule-Free as a torch optimizer: parameters hold y in train mode and x in eval mode."""

from __future__ import annotations

import pytest
import torch

from tests.data.bowl import SHAPES, loss_fn, noise
from tests.torch_loops import (
    SCHEDULE_FREE,
    bowl_steps,
    equal,
    trained_bowl,
    weights,
)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_train_and_eval_swap_y_and_x(name: str) -> None:
    model, optimizer = trained_bowl(name)
    y = weights(model)
    optimizer.train()  # already
    assert equal(weights(model), y)
    optimizer.eval()
    x = {n: optimizer.state[p]["x"] for n, p in model.named_parameters()}
    assert equal(weights(model), x) and not any(torch.equal(x[n], y[n]) for n in SHAPES)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"eval mode.*optimizer\.train\(\)"):
        optimizer.step()
    optimizer.train()
    assert equal(weights(model), y)
    never_swapped, _ = trained_bowl(name, 6)
    bowl_steps(model, optimizer, range(4, 6))
    assert equal(weights(model), weights(never_swapped))


def test_what_is_written_in_eval_mode_is_x_and_in_train_mode_is_y() -> None:
    model, optimizer = trained_bowl("sf_adamw")
    optimizer.eval()
    with torch.no_grad():
        model.bias.fill_(7.0)
    optimizer.train()
    assert torch.equal(optimizer.state[model.bias]["x"], torch.full((160,), 7.0))
    assert not torch.equal(model.bias, torch.full((160,), 7.0))  # y: z pulls at it
    with torch.no_grad():
        model.bias.fill_(8.0)
    z = optimizer.state[model.bias]["z"].clone()
    optimizer.eval()  # x is such that y is what was written
    torch.testing.assert_close(z + 0.9 * (model.bias.detach() - z), torch.full((160,), 8.0))


def test_saving_or_evaluating_in_train_mode_warns_once() -> None:
    model, optimizer = trained_bowl("sf_adamw", 0)
    optimizer.state_dict()  # y is x still
    loss_fn(model, *noise(0)).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="are Schedule-Free's y, not the average x") as said:
        optimizer.state_dict()
        optimizer.state_dict()
    assert len(said) == 1
    with pytest.warns(UserWarning, match=r"the model is evaluated .* while the optimizer is in train mode") as said:
        model.eval()
        model(*noise(0))
        model(*noise(0))
    assert len(said) == 1
    model, optimizer = trained_bowl("sf_adamw")
    optimizer.eval()
    optimizer.state_dict()
    model.eval()(*noise(0))
    model, optimizer = trained_bowl("adamw")
    optimizer.state_dict()
    model.eval()(*noise(0))
