"""One group as flat state: banks, masters, and state by parameter."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile import optim
from fusion_compile.optim import as_torch_optimizer
from tests.data.bowl import Bowl, loss_fn, noise
from tests.small_models import batches, mlp
from tests.torch_loops import (
    close_to_torch,
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


@pytest.mark.parametrize("name", ["adamw", "sf_adamw"])
def test_a_parameter_that_is_rebound_is_taken_back_with_what_it_holds(name: str) -> None:
    """Before the first step it may lie anywhere, as after ``model.to(device)``; later it is taken back."""
    found = []
    for rebound in (True, False):
        model = mlp()
        optimizer = made(model.named_parameters(), name, lr=1e-2)
        for batch in batches(4):
            if rebound:
                for p in model.parameters():
                    p.data = p.data.clone()
            train(model, optimizer, [batch])
        optimizer.eval()
        found.append(weights(model))
    assert equal(*found)


def test_values_that_are_put_in_by_rebinding_count() -> None:
    model, reference = mlp(), mlp()
    optimizer, theirs = made(model, optim.adamw(lr=1e-2)), torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for m, o in ((model, optimizer), (reference, theirs)):
        train(m, o, batches(2))
        m.get_parameter("0.weight").data = torch.full((8, 4), 0.25)
        train(m, o, batches(4)[2:])
    close_to_torch(model, reference)


def test_a_parameter_that_no_longer_fits_is_refused_with_a_way_out() -> None:
    model = mlp()
    optimizer = made(model.named_parameters(), optim.adamw(lr=1e-2))
    train(model, optimizer, batches(2))
    optimizer.zero_grad()
    model.double()
    start = weights(model)
    loss_of(model, batches(1, dtype=torch.float64)[0]).backward()
    with pytest.raises(
        RuntimeError, match=r"0\.weight \[8, 4\] torch\.float32 .*load_state_dict\(optimizer\.state_dict"
    ):
        optimizer.step()
    assert equal(weights(model), start)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not equal(weights(model), start)


def test_sam_as_everybody_copies_it() -> None:
    """The old weights come back by ``p.data = …``, from an entry of the optimizer's state."""
    found = []
    for ours in (True, False):
        model = mlp()
        optimizer: Any = made(model, lr=1e-2) if ours else torch.optim.AdamW(model.parameters(), lr=1e-2)
        kept: Any = optimizer.state if ours else defaultdict(dict)  # torch's fails, as it takes it for its own state
        for batch in batches(4):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            for p in model.parameters():
                assert p.grad is not None
                kept[p]["old_p"] = p.data.clone()
                p.data.add_(p.grad, alpha=0.05)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            for p in model.parameters():
                p.data = kept[p]["old_p"]
            optimizer.step()
        found.append(model)
    close_to_torch(*found)


def test_two_optimizers_may_share_parameters_in_two_programs() -> None:
    """An actor and a critic over one trunk: each step takes the trunk over, and nothing is compiled again."""
    found = []
    for ours in (True, False):
        trunk, heads = mlp(), (nn.Linear(2, 1), nn.Linear(2, 1))
        for i, head in enumerate(heads):
            nn.init.constant_(head.weight, 0.5 + i)
            nn.init.zeros_(head.bias)
        optimizers: list[Any] = [
            as_torch_optimizer([*trunk.parameters(), *head.parameters()], "adamw", lr=1e-2, backend="aot_eager")
            if ours
            else torch.optim.AdamW([*trunk.parameters(), *head.parameters()], lr=1e-2)
            for head in heads
        ]
        for i, (x, _) in enumerate(batches(6)):
            optimizers[i % 2].zero_grad()
            heads[i % 2](trunk(x)).square().mean().backward()
            optimizers[i % 2].step()
        if ours:
            assert [len(o._inside.runs) for o in optimizers] == [1, 1]
        found.append(nn.ModuleList([trunk, *heads]))
    close_to_torch(*found)


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


@pytest.mark.parametrize(("name", "kept"), [("adamw", True), ("sf_adamw", True), ("muon", True), ("soap", False)])
def test_channels_last_weights_stay_so(name: str, kept: bool) -> None:
    """Both convolutions: a matrix for muon and soap, whose bases would be those of other columns, and a small one."""
    found = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.Conv2d(128, 8, 1), nn.Conv2d(8, 4, 3))
        model.to(memory_format=memory_format)  # type: ignore[call-overload]
        strides = {n: p.stride() for n, p in model.named_parameters()}
        # In fp32, whose rounding in another order of summation is small.
        options = {"matmul_dtype": torch.float32} if name == "muon" else {}
        optimizer = made(model, functools.partial(optim.RECIPES[name], **options))
        for i in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, 128, 6, 6, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            optimizer.step()
        optimizer.eval()
        changed = {n for n, p in model.named_parameters() if p.stride() != strides[n]}
        assert changed == (set() if kept or memory_format is torch.contiguous_format else {"0.weight"})
        found.append(weights(model))
    if not kept:
        return  # the bases of soap follow the rounding of a gradient of low rank
    for n, p in found[0].items():
        # 2 steps of at most 0.02 an entry; convolutions sum in another order in the two formats
        torch.testing.assert_close(p, found[1][n], rtol=1e-3, atol=2e-4, msg=n)
