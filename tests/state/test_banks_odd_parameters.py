"""Tied, frozen, unread, empty, 0-dim, transposed and convolution parameters train as in the ordinary loop."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from tests.small_models import PROGRAMS, assert_same_weights, batches, compiled, mlp, tensor_bits, torch_loop


def test_tied_weights_are_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.outside.weight = self.inside.weight
            nn.init.normal_(self.inside.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.outside(torch.tanh(self.inside(x)))[:, :2]

    torch.manual_seed(0)
    model = Tied()
    reference = copy.deepcopy(model)
    step = compiled(model)
    for batch in batches(6):
        step(*batch)
    torch_loop(reference, batches(6))
    assert model.outside.weight is model.inside.weight and len(step.routes) == 1
    assert_same_weights(model, reference)


def test_frozen_parameters_are_not_touched() -> None:
    model, reference = mlp(), mlp()
    for m in (model, reference):
        m.get_parameter("0.weight").requires_grad_(False)
    first = model.get_parameter("0.weight")
    frozen = (first.data_ptr(), tensor_bits(first))
    step = compiled(model, optimizer="sf_adamw", lr=0.1, mode="eager")
    step.hyperparameters["weight_decay"] = 0.5
    before = [p.detach().clone() for p in model.parameters()]
    for batch in batches(3):
        step(*batch)
    first = model.get_parameter("0.weight")
    assert (first.data_ptr(), tensor_bits(first)) == frozen
    assert [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)] == [True, False, False, False]


class Odd(nn.Module):
    """A convolution, a transposed view, an empty, a 0-dim and a 1 x 1 parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 2)
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.one = nn.Parameter(torch.full((1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.convolution(x.view(len(x), 1, 2, 2)).view(len(x), 3)
        wide = torch.cat([self.transposed, self.empty])
        return (self.scale * torch.tanh(seen @ wide.t()) + self.one)[:, :2]


@pytest.mark.parametrize("program", PROGRAMS)
def test_odd_parameters_train_as_in_the_ordinary_loop(program: str) -> None:
    torch.manual_seed(0)
    model = Odd()
    reference = copy.deepcopy(model)
    assert not model.transposed.is_contiguous()
    step = compiled(model, **PROGRAMS[program])
    for batch in batches(8):
        step(*batch)
    torch_loop(reference, batches(8))
    assert_same_weights(model, reference)


def test_odd_parameters_take_the_spectral_path_where_they_can() -> None:
    model = Odd()
    step = compiled(model, optimizer="muon", force_spectral=["convolution.weight", "transposed"], mode="eager")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for batch in batches(2):
        step(*batch)
    assert {r.name: r.role for r in step.routes}["convolution.weight"] == "spectral"
    assert model.convolution.weight.shape == (3, 1, 2, 2)
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == {"empty"}


def test_a_parameter_the_loss_never_reads_warns_once_and_only_decays() -> None:
    model = mlp()
    model.idle = nn.Parameter(torch.ones(3))
    step = compiled(model, optimizer=fc.optim.adamw(lr=0.1, weight_decay=0.5), mode="eager")
    with pytest.warns(UserWarning, match=r"the loss never reads idle: .* Freeze them") as caught:
        step(*batches(1)[0])
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*batches(1)[0])
        step(*batches(1, size=3)[0])  # another program of the same step
    torch.testing.assert_close(model.idle.detach(), torch.full((3,), (1 - 0.1 * 0.5) ** 3))


def test_complex_weights_are_refused_with_the_way_that_works() -> None:
    model = nn.Linear(4, 2)
    model.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=r"wave \[2\] is a torch\.complex64 .* keep torch\.view_as_real of it as the par"
    ):
        compiled(model)
    model.wave = nn.Parameter(torch.ones(2, 2))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wave = torch.view_as_complex(model.wave)  # type: ignore[arg-type]
        return (torch.fft.fft(model(x)) * wave - y).abs().square().mean()

    reference = copy.deepcopy(model)
    step = compiled(model, loss, mode="eager")
    losses = [step(*batch) for batch in batches(3)]
    torch.testing.assert_close(losses, torch_loop(reference, batches(3), loss))
    assert_same_weights(model, reference)
