"""The loss as a pure function, and what one run on fake tensors finds out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._step.carried import Carried
from fusion_compile._step.loss import LossFacts, LossModule, examine
from tests.small_models import batches, mlp, squared_error


def facts_of(model: nn.Module, loss_fn: Any, *batch: Any, uncaptured: bool = False) -> LossFacts:
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return examine(model, loss_fn, weights, batch, None, Carried(), uncaptured=uncaptured)


def test_metrics_unread_parameters_and_changed_buffers_are_found() -> None:
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "idle": nn.Linear(2, 2)})
    model.register_buffer("kept", torch.zeros(1))

    def loss(model: nn.ModuleDict, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = model["norm"](x)
        return out.square().mean(), {"top": out.amax(0)}

    facts = facts_of(model, loss, torch.randn(8, 4))
    assert facts.metrics == {"top": ((4,), torch.float32)}
    assert facts.unused == ("idle.weight", "idle.bias")
    assert facts.changed_buffers == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def test_the_run_changes_no_weight_no_buffer_and_draws_no_random_number() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    facts_of(model, squared_error, *batches(1)[0])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_loss_that_reads_values_is_looked_at_on_clones_where_nothing_is_captured() -> None:
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "drop": nn.Dropout(0.5), "idle": nn.Linear(2, 2)})
    batch = torch.randn(8, 4)

    def loss(model: nn.ModuleDict, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = model["drop"](model["norm"](x.mul_(2)))
        return out[x > 0].square().mean() * x.sum().item(), {"top": out.amax(0)}

    before, random = {n: t.clone() for n, t in (*model.state_dict().items(), ("x", batch))}, torch.get_rng_state()
    with pytest.raises(ValueError, match="reads a tensor's value on the host"):
        facts_of(model, loss, batch)
    facts = facts_of(model, loss, batch, uncaptured=True)
    assert facts.metrics == {"top": ((4,), torch.float32)} and facts.unused == ("idle.weight", "idle.bias")
    assert facts.changed_buffers == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert all(torch.equal(t, before[n]) for n, t in (*model.state_dict().items(), ("x", batch)))
    assert torch.equal(torch.get_rng_state(), random)


def test_a_module_under_two_names_has_its_own_parameter_again() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.encoder, self.head = nn.ModuleDict({"embed": self.shared}), nn.Linear(4, 4)
            self.head.weight = self.shared.weight

    model = Tied()
    own, other = model.shared.weight, torch.zeros(4, 4)
    with LossModule(model, squared_error).holding({"shared.weight": other}, {}):
        assert all(m.weight is other for m in (model.shared, model.encoder["embed"], model.head))
    assert model.shared.weight is own and model.head.weight is own


def test_a_difference_is_said_in_words() -> None:
    one = LossFacts({}, (), ())
    assert LossFacts({}, ("a",), ()).difference(one) == "leaves unread ['a'], before []"
    small, large = (LossFacts({"m": (shape, torch.float32)}, (), ()) for shape in ((2,), (4,)))
    assert "returns the metric 'm' as [2] torch.float32, before as [4]" in small.difference(large)


def test_facts_join_the_buffers_that_either_changes() -> None:
    one = LossFacts({}, ("a",), ("mean",))
    assert one.joined(None) is one
    assert LossFacts({}, ("a",), ("table",)).joined(one) == LossFacts({}, ("a",), ("mean", "table"))
    with pytest.raises(ValueError, match=r"leaves unread \[\], before \['a'\]"):
        LossFacts({}, (), ()).joined(one)
    first, then = LossFacts({"a": ((), torch.float32)}, (), ()), LossFacts({"b": ((), torch.float32)}, (), ())
    assert then.joined(first).metrics == {**first.metrics, **then.metrics}


def test_the_loss_runs_with_the_weights_that_it_is_given() -> None:
    model = mlp()
    x, y = batches(1)[0]
    loss = LossModule(model, squared_error)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    with loss.holding(zeros, {}):
        value, metrics, buffers = loss(x, y)
    assert torch.equal(value, y.square().mean()) and metrics == buffers == {}
    assert any(bool(p.any()) for p in model.parameters())
