"""Groups that are updated together: their numbers, parameters without gradients, gradients that no bank holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fusion_compile import optim
from fusion_compile.optim import Transform, as_torch_optimizer
from tests.data.bowl import Bowl, loss_fn, noise
from tests.small_models import batches, mlp
from tests.torch_loops import (
    close_to_torch,
    counting,
    equal,
    loss_of,
    made,
    train,
    trained_bowl,
    two_groups,
    weights,
)


@pytest.mark.parametrize("named", [True, False])
def test_groups_override_numbers_in_one_program(named: bool) -> None:
    model, reference = mlp(), mlp()
    optimizer = as_torch_optimizer(two_groups(model, named), optim.adamw(lr=1e-2), backend="aot_eager")
    train(model, optimizer, batches(8))
    train(reference, torch.optim.AdamW(two_groups(reference, False), lr=1e-2), batches(8))
    close_to_torch(model, reference)
    assert len(optimizer._inside.runs) == 1
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 3e-3]
    assert [g["steps"] for g in optimizer.param_groups] == [8, 8]


def test_a_group_may_join_later() -> None:
    model, reference = mlp(), mlp()
    optimizer = made(two_groups(model)[:1], optim.adamw(lr=1e-2))
    other = torch.optim.AdamW(two_groups(reference, False)[:1], lr=1e-2)
    for m, o, named in ((model, optimizer, True), (reference, other, False)):
        train(m, o, batches(3))
        o.add_param_group(two_groups(m, named)[1])
        train(m, o, batches(6)[3:])
    close_to_torch(model, reference)


def test_a_scheduler_that_reaches_one_of_two_rates_is_said_once() -> None:
    def run(transform: Transform) -> None:
        model = Bowl()
        optimizer = made(model, transform)
        scheduler = LambdaLR(optimizer, lambda i: 1 / (1 + i))
        for i in range(3):
            loss_fn(model, *noise(i)).backward()
            optimizer.step()
            scheduler.step()

    with pytest.warns(UserWarning, match=r"scalar_lr stayed.*muon\(scalar_lr=optim.cosine") as said:
        run(optim.muon())
    assert len(said) == 1
    run(optim.muon(scalar_lr=optim.linear(1e-3, 10)))  # a warning is an error here


def only_some(model: nn.Module, step: int) -> None:
    """Every second step the last layer has no gradient, every third no bias has one."""
    for n, p in model.named_parameters():
        if (step % 2 and n.startswith("2.")) or (step % 3 == 2 and n.endswith("bias")):
            p.grad = None


@pytest.mark.filterwarnings("ignore:.* has a gradient, and had none")
@pytest.mark.parametrize("options", [{"mode": "eager"}, {"backend": "aot_eager"}])
def test_a_parameter_without_a_gradient_is_left_alone(options: dict[str, Any]) -> None:
    """Against torch.optim, without Adam's bias correction, whose count is the group's here: with SGD with momentum."""
    transform = optim.chain(optim.scale_by_adam((0.0, 0.0), eps=1.0), optim.scale_by_learning_rate(1e-2))
    model, reference = mlp(), mlp()
    optimizer = as_torch_optimizer(model, transform, **options)
    other = torch.optim.Adam(reference.parameters(), lr=1e-2, betas=(0.0, 0.0), eps=1.0)
    for i, batch in enumerate(batches(9)):
        for m, o in ((model, optimizer), (reference, other)):
            o.zero_grad()
            loss_of(m, batch).backward()
            only_some(m, i)
            o.step()
    close_to_torch(model, reference)
    assert len(optimizer._inside.runs) == 1, "one program, whichever gradients a step misses"


@pytest.mark.parametrize("name", optim.RECIPES)
def test_of_a_parameter_without_a_gradient_no_bit_of_weight_or_state_changes(name: str) -> None:
    """A whole matrix of a stacked bank, a part of a flat one; what the others share runs on."""
    model = nn.ModuleDict({n: nn.Linear(128, 128) for n in "abc"})
    optimizer = made(model, name)
    for i in range(4):
        for n, p in model.named_parameters():
            p.grad = None if i > 1 and n.startswith("b") else torch.randn_like(p)
        if i == 2:
            before = {n: {k: t.clone() for k, t in optimizer.state[p].items()} for n, p in model.named_parameters()}
            start = weights(model)
        optimizer.set_loss(1.0)
        optimizer.step()
    for n, p in model.named_parameters():
        parts = {k for k, t in optimizer.state[p].items() if t.ndim and not torch.equal(t, before[n][k])}
        assert torch.equal(p, start[n]) is (n.startswith("b"))
        assert bool(parts) is not n.startswith("b"), (n, parts)


def test_nothing_happens_without_any_gradient_and_an_idle_group_stands_still() -> None:
    model = mlp()
    optimizer = made(two_groups(model))
    before = weights(model)
    optimizer.step()
    assert equal(weights(model), before) and not optimizer.state_dict()["state"]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [g["steps"] for g in optimizer.param_groups] == [1, 0]
    after = weights(model)
    assert {n for n in after if not torch.equal(after[n], before[n])} == {"0.weight", "2.weight"}


@pytest.mark.parametrize("name", ["adamw", "sf_adamw"])
def test_a_frozen_parameter_takes_no_memory_and_joins_when_it_has_a_gradient(name: str) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = made(model, name)
    train(model, optimizer, batches(3))
    assert {n for n, p in model.named_parameters() if optimizer.state.get(p)} == {"2.weight", "2.bias"}
    first = weights(model)
    kept = {k: t.clone() for k, t in optimizer.state[model.get_parameter("2.weight")].items()}
    model[0].requires_grad_(True)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, batches(1))
    assert len(optimizer.state) == 4
    if name == "sf_adamw":  # at lr = 0 z stands still
        assert torch.equal(optimizer.state[model.get_parameter("2.weight")]["z"], kept["z"])
    assert float(kept[next(k for k in kept if "beta2_power" in k)]) > float(
        optimizer.state[model.get_parameter("2.weight")][next(k for k in kept if "beta2_power" in k)]
    ), "the group's count went on"
    optimizer.param_groups[0]["lr"] = 1e-2
    train(model, optimizer, batches(2))
    assert not any(torch.equal(p, first[n]) for n, p in model.named_parameters())


def test_a_frozen_parameter_comes_back_with_the_moments_it_was_saved_with() -> None:
    """And the others' count, not the one of the checkpoint, goes on."""
    model, optimizer = trained_bowl("adamw")
    saved = copy.deepcopy(optimizer.state_dict())
    model.tall.requires_grad_(False)
    fresh = made(model, "adamw")
    fresh.load_state_dict(saved)
    moments = fresh.state[model.tall]["0.nu"].clone()
    for thaw in (False, False, True):
        model.tall.requires_grad_(thaw)
        model.zero_grad()
        loss_fn(model, *noise(0)).backward()
        fresh.step()
    assert model.tall.grad is not None
    expected = 0.999 * moments + 0.001 * model.tall.grad.square()
    torch.testing.assert_close(fresh.state[model.tall]["0.nu"], expected)
    assert float(fresh.state[model.tall]["0.beta1_power"]) == pytest.approx(0.9**7)


def test_a_matrix_joins_a_group_that_had_none() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 2))
    model[0].requires_grad_(False)
    optimizer = made(model, "sf_normuon")
    x = torch.randn(4, 128)
    for thaw in (False, True):
        model[0].requires_grad_(thaw)
        before = weights(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert torch.equal(model.get_parameter("0.weight"), before["0.weight"]) is not thaw
    assert {r.role for r in optimizer.routes} == {"spectral", "scalar"}


def test_gradients_that_no_bank_holds_are_refused_with_the_parameters_name() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = made(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of weight \[5, 3\] is sparse"):
        optimizer.step()
    p = nn.Parameter(torch.ones(2))
    optimizer = made([p])
    p.grad_dtype = None  # torch then lets a gradient have another dtype
    p.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\] \[2\] is torch.float64 on cpu"):
        optimizer.step()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.step()


def test_groups_on_two_devices_are_refused() -> None:
    here, there = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    optimizer = made([{"params": [("here", here)]}, {"params": [("there", there)]}])
    here.grad, there.grad = torch.ones_like(here), torch.ones_like(there)
    with pytest.raises(ValueError, match="there of parameter group 1 lies on meta, parameter group 0 on cpu"):
        optimizer.step()


def test_diagnostics_of_each_group() -> None:
    def told(state: Any) -> dict[str, Tensor]:
        return {"comp/count": state[0]}

    transform = counting(True, []).with_extras(diagnostics=told)
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    alone, both = made([p], transform), made([{"params": [p]}, {"params": [q]}], transform)
    for optimizer, names in ((alone, {"comp/count"}), (both, {"0/comp/count", "1/comp/count"})):
        assert optimizer.diagnostics == {}
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        assert {n: float(t) for n, t in optimizer.diagnostics.items()} == dict.fromkeys(names, 100.0)


def test_a_number_that_nothing_reads_for_its_group_is_refused_and_a_copy_of_the_defaults_is_not() -> None:
    """muon reads lr for matrices and scalar_lr for the rest: written into the wrong group, it was a float in
    param_groups that did nothing. A group's weight_decay is what its parameters decay by, under either name."""
    model = Bowl()
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and min(p.shape) >= 128]
    rest = [(n, p) for n, p in model.named_parameters() if not (p.ndim == 2 and min(p.shape) >= 128)]
    assert matrices and rest
    with pytest.raises(ValueError, match=r"^parameter group 0 sets 'scalar_weight_decay', but muon does not .*weight_"):
        as_torch_optimizer([{"params": matrices, "scalar_weight_decay": 0.5}, {"params": rest}], "muon")
    decayed = as_torch_optimizer([{"params": matrices}, {"params": rest, "weight_decay": 0.5}], "muon")
    assert [g["scalar_weight_decay"] for g in decayed.param_groups][1] == 0.5
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "scalar_weight_decay": 0.5}]
    first = as_torch_optimizer(groups, "muon", lr=0.01)
    copied = [{**g, "params": named} for g, named in zip(first.param_groups, (matrices, rest), strict=True)]
    with pytest.raises(ValueError, match=r"parameter group 1 sets 'lr', but muon"):
        as_torch_optimizer(copied, "muon")
    again = as_torch_optimizer(copied, "muon", lr=0.01)
    assert [g["weight_decay"] for g in again.param_groups] == [0.5, 0.1]
    late = as_torch_optimizer([{"params": matrices}], "muon")
    with pytest.raises(ValueError, match=r"parameter group 1 sets 'lr'"):
        late.add_param_group({"params": rest, "lr": 0.5})
    assert len(late.param_groups) == 1


def test_a_rate_that_nothing_reads_is_refused() -> None:
    """A model whose matrices are all small has only scalar_lr under muon."""
    model = mlp()
    with pytest.raises(ValueError, match=r"^the optimizer sets 'lr', but muon does not read it .*scalar_lr"):
        as_torch_optimizer(model, "muon", lr=1.0)
    as_torch_optimizer(model, "muon", force_spectral=[r"^0\.weight$"], lr=1.0)
    as_torch_optimizer(model, "sf_normuon", lr=1.0)
