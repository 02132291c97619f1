"""Tensors in caches of ``functools.lru_cache``: kept, refused, or a reason to run."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.rehearsal.rehearsal import rehearse
from fusion_compile._capture.rehearsal.result_caches import tensors_in
from tests.small_models import batches, compiled, squared_error, torch_loop


def model() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(4, 2)


class Loss:
    """Divides by a norm that the first call computes: of the weights, or of a table."""

    def __init__(self, weight: Tensor) -> None:
        @functools.lru_cache
        def norm() -> Tensor:
            return weight.detach().norm().clone()

        @functools.lru_cache
        def table(columns: int) -> Tensor:
            return torch.arange(columns) / columns

        self.norm, self.table = norm, table

    def by_norm(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return squared_error(model, x, y) / self.norm()

    def by_table(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return squared_error(model, x + self.table(4), y)


class Biased(nn.Module):
    """Caches a method's table by its length; the cache's first argument is the module with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def table(self, columns: int) -> Tensor:
        return torch.arange(columns) / columns

    @functools.cache  # noqa: B019
    def scale(self) -> Tensor:
        return self.linear.weight.detach().norm().clone()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.table(4)
        return out


def test_of_a_methods_cache_the_results_count_and_not_the_module() -> None:
    module = Biased()
    assert tensors_in(Biased.table) == tensors_in(Biased.scale) == []
    table, scale = module.table(3), module.scale()
    assert [id(t) for t in tensors_in(Biased.table)] == [id(table)]
    assert [id(t) for t in tensors_in(Biased.scale)] == [id(scale)]
    with_argument = functools.cache(torch.neg)
    given = torch.ones(1)
    with_argument(given)
    assert given.data_ptr() in {t.data_ptr() for t in tensors_in(with_argument)}
    model = nn.Sequential(Biased(), Biased())
    rehearsal = rehearse({"model": model}, lambda: model(torch.ones(2, 4)).sum())
    assert not [record.label for record in rehearsal.left] and rehearsal.lru_caches == 1


@pytest.mark.parametrize("capture", [None, "read", "run"])
def test_a_result_that_the_first_step_computes_from_weights_is_refused(capture: Any) -> None:
    net = model()
    step = compiled(net, Loss(net.weight).by_norm, capture=capture)
    before = net.weight.clone()
    with pytest.raises(ValueError, match=r"(?s)norm\(…\) is set by the first forward .* functools.lru_cache keeps it"):
        step(*batches(1)[0])
    assert torch.equal(net.weight, before)


def test_uncompiled_it_is_the_ordinary_loops() -> None:
    net = model()
    wanted = torch_loop(net, batches(4), Loss(net.weight).by_norm, lr=0.1)
    net = model()
    step = compiled(net, Loss(net.weight).by_norm, lr=0.1, mode="eager")
    torch.testing.assert_close(torch.stack([step(*b) for b in batches(4)]), torch.stack(wanted), rtol=1e-5, atol=1e-6)


def test_a_result_from_before_is_kept_and_the_step_runs() -> None:
    net = model()
    loss = Loss(net.weight)
    loss.norm()
    wanted = torch_loop(net, batches(4), loss.by_norm, lr=0.1)
    net = model()
    loss = Loss(net.weight)
    loss.norm()
    step = compiled(net, loss.by_norm, lr=0.1)
    with pytest.warns(UserWarning, match=r"norm\(…\) gives out a tensor that functools.lru_cache keeps"):
        losses = [step(*batch) for batch in batches(4)]
    torch.testing.assert_close(torch.stack(losses), torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert step.programs[0].captured_by == "run"
    loss = Loss(net.weight)
    loss.norm()
    read = compiled(model(), loss.by_norm, capture="read")
    with pytest.raises(ValueError, match="keep the tensor in an attribute"):
        read(*batches(1)[0])


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_table_that_depends_on_nothing_is_read_at_every_shape() -> None:
    net = model()
    loss = Loss(net.weight)
    step = compiled(net, loss.by_table)
    step(*batches(1, size=8)[0])
    step(*batches(1, size=6)[0])
    assert [program.captured_by for program in step.programs] == ["read", "read"]
