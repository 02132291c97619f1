"""A factored second moment by hand, on matrices, stacks and vectors, and the roles that it asks for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion_compile import optim
from fusion_compile._state.routing import route
from fusion_compile.optim.scale_by_factored_rms import inverse_root
from tests.optim.walks import Walk, a_bank_moves_as_its_members, keeps_the_laws


def test_by_hand() -> None:
    walk = Walk(optim.scale_by_factored_rms(0.9, eps=0.0), {"w": torch.zeros(2, 3, dtype=torch.float64)})
    r, c = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    for i in range(3):
        g = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        r, c = 0.9 * r + 0.1 * (g * g).mean(1, keepdim=True), 0.9 * c + 0.1 * (g * g).mean(0, keepdim=True)
        torch.testing.assert_close(walk({"w": g})["w"], g / (r * c / r.mean()).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(inverse_root(r, c), 1 / (r * c / r.mean()).sqrt(), rtol=1e-12, atol=0)


def test_a_rank_one_square_is_divided_out_exactly_and_zeros_stay() -> None:
    rows, columns = torch.rand(5, 1).double() + 0.5, torch.rand(1, 7).double() + 0.5
    walk = Walk(optim.scale_by_factored_rms(0.0), {"w": torch.zeros(5, 7).double(), "b": torch.zeros(3).double()})
    found = walk({"w": rows * columns, "b": torch.tensor([0.0, 2.0, -3.0]).double()})
    torch.testing.assert_close(found["w"], torch.ones(5, 7).double(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found["b"], torch.tensor([0.0, 1.0, -1.0]).double(), rtol=1e-9, atol=0)
    assert not bool(walk({"w": torch.zeros(5, 7).double(), "b": torch.zeros(3).double()})["w"].any())


def test_laws() -> None:
    whole = optim.chain(optim.scale_by_factored_rms(), optim.clip_update_rms(), optim.scale_by_learning_rate(1e-3))
    keeps_the_laws(whole, {"matrix/a": torch.randn(3, 8, 5), "scalar/b": torch.randn(7)})
    a_bank_moves_as_its_members(lambda: optim.chain(optim.scale_by_factored_rms(), optim.scale_by_learning_rate(1e-3)))
    with pytest.raises(ValueError, match="added to squares"):
        optim.scale_by_factored_rms(eps=-1.0)


def test_every_matrix_is_one_whatever_its_size_and_convolutions_are_flattened() -> None:
    model = nn.ModuleDict(
        {"small": nn.Linear(3, 2), "conv": nn.Conv2d(4, 6, 3), "norm": nn.LayerNorm(5), "table": nn.Embedding(7, 3)}
    )
    model.register_parameter("experts", nn.Parameter(torch.zeros(4, 40, 50)))
    routes = {r.name: r for r in route(model, ("matrix", "scalar"), ["table"])}
    assert {n: r.role for n, r in routes.items() if r.role == "matrix"} == {
        "small.weight": "matrix",
        "conv.weight": "matrix",
        "experts": "matrix",
    }
    assert routes["conv.weight"].matrix == (6, 36) and routes["experts"].matrix == (40, 50)
    assert routes["table.weight"].role == "scalar"  # forced
