"""One group as flat state: banks, masters, and state by parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion_compile import optim
from tests.data.bowl import Bowl, loss_fn, noise
from tests.small_models import batches, mlp
from tests.torch_loops import (
    equal,
    loss_of,
    made,
    train,
    trained_bowl,
    weights,
)


def test_the_program_has_as_many_inputs_for_many_parameters_as_for_few() -> None:
    counts = []
    for layers in (2, 9):
        model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(layers)))
        optimizer = made(model.named_parameters(), "sf_normuon")
        model(torch.ones(1, 128)).sum().backward()
        optimizer.step()
        group = optimizer._inside.records[0].group
        assert group is not None
        gradients = group.gather({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        counts.append((len(gradients), len(group.state)))
    assert counts[0] == counts[1] == (2, counts[0][1])


def test_half_precision_parameters_have_a_master_and_what_is_written_into_them_counts() -> None:
    """Steps of 1e-4 from 1 are lost in bf16, whose next number below is 0.996, and not in the master."""
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = made([p], optim.adamw(lr=1e-4, weight_decay=0.0))
    for _ in range(60):
        p.grad = torch.ones_like(p)
        optimizer.step()
    master = optimizer.state[p]["master"]
    assert master.dtype == torch.float32 and torch.equal(p, master.bfloat16())
    torch.testing.assert_close(master, torch.full((5,), 1 - 60e-4), rtol=0, atol=4e-6)  # 60 roundings of 6e-8
    with torch.no_grad():
        p.fill_(2.0)
    optimizer.step()
    torch.testing.assert_close(master, torch.full((5,), 2 - 1e-4), rtol=0, atol=1e-6)


def test_a_write_into_half_precision_weights_counts_without_a_gradient_too() -> None:
    p, q = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = made([p, q])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    with torch.no_grad():
        p.fill_(3.0)
    p.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master"], torch.full((4,), 3.0)) and bool((p == 3).all())


def test_a_model_may_move_until_the_first_step_and_after_it_is_refused_with_a_way_out() -> None:
    model = mlp()
    optimizer = made(model.named_parameters(), optim.adamw(lr=1e-2))
    for p in model.parameters():
        p.data = p.data.clone()  # as model.to(device) does
    train(model, optimizer, batches(2))
    start = weights(model)
    model.get_parameter("0.weight").data = model.get_parameter("0.weight").data.clone()
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight \[8, 4\] was rebound.*load_state_dict\(optimizer\.state_dict"):
        optimizer.step()
    assert equal(weights(model), start)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(4)[2:])
    other = mlp()
    train(other, made(other.named_parameters(), optim.adamw(lr=1e-2)), batches(4))
    assert equal(weights(model), weights(other))


def test_clearing_the_state_starts_fresh() -> None:
    model, optimizer = trained_bowl("adamw")
    fresh = Bowl()
    fresh.load_state_dict(model.state_dict())
    other = made(fresh)
    optimizer.state.clear()
    for m, o in ((model, optimizer), (fresh, other)):
        m.zero_grad()
        loss_fn(m, *noise(9)).backward()
        o.step()
    assert equal(weights(model), weights(fresh)) and optimizer.param_groups[0]["steps"] == 1
