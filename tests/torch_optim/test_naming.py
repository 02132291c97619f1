"""Names for parameters that come without, and for two that come with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile import optim
from fusion_compile._torch_optim.naming import full_names, has_place_only
from tests.small_models import batches, mlp
from tests.torch_loops import close_to_torch, made, train, weights


def test_the_name_is_the_models_or_that_of_the_module_the_others_are_named_in() -> None:
    model = mlp()
    known = {"0.weight": model.get_parameter("0.weight")}
    rest = [model.get_parameter(n) for n in ("0.bias", "2.weight", "2.bias")]
    assert full_names(rest, 1, known, None) == ["0.bias", "2.weight", "2.bias"]
    assert full_names(rest, 1, {}, model) == ["0.bias", "2.weight", "2.bias"]
    stranger = nn.Parameter(torch.ones(1))
    names = full_names([stranger, ("mine", rest[0])], 1, known, None)
    assert names == ["param_groups[1]['params'][0]", "mine"]
    assert [has_place_only(n) for n in names] == [True, False]


def test_two_parameters_of_one_name_are_both_trained() -> None:
    """Two models' named parameters in one optimizer: the second of a name was dropped without a word."""
    pairs = [(mlp(), mlp()) for _ in range(2)]
    optimizers: list[Any] = []
    for ours, (a, b) in zip((True, False), pairs, strict=True):
        named: Any = [*a.named_parameters(), *b.named_parameters()]
        optimizers.append(made(named, optim.adamw(lr=1e-2)) if ours else torch.optim.AdamW(named, lr=1e-2))
    for (a, b), optimizer in zip(pairs, optimizers, strict=True):
        for x, y in batches(3):
            optimizer.zero_grad()
            (a(x) - y + b(x)).square().mean().backward()
            optimizer.step()
    for i in range(2):
        close_to_torch(pairs[0][i], pairs[1][i])
    assert optimizers[0]._inside.records[0].names[4] == "0.weight (2)"


# A matrix recipe warns of plain parameters when its first group is made, so they are of an elementwise one.
@pytest.mark.parametrize(
    ("name", "of"),
    [(name, of) for of in ("the model", "named parameters") for name in ("adamw", "sf_normuon")]
    + [("adamw", "plain parameters")],
)
def test_plain_parameters_of_a_known_model_join(name: str, of: str) -> None:
    """As Lightning's ``BaseFinetuning`` adds them."""
    model = nn.Sequential(nn.Linear(4, 128), nn.Linear(128, 128), nn.Linear(128, 2))
    late = list(model[1].parameters())
    early = [(n, p) for n, p in model.named_parameters() if not n.startswith("1.")]
    params: Any = early if of != "plain parameters" else [p for _, p in early]
    optimizer = made(params, name, model=model if of == "the model" else None)
    start = weights(model)
    train(model, optimizer, batches(2))
    optimizer.add_param_group({"params": late, "lr": 1e-3})
    train(model, optimizer, batches(2))
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters())
    if of != "plain parameters":
        assert optimizer._inside.records[1].names == ["1.weight", "1.bias"]
        assert ("spectral" in {r.role for r in optimizer.routes}) is (name == "sf_normuon")


@pytest.mark.parametrize("named_first", [True, False])
def test_groups_with_names_and_groups_without_go_together(named_first: bool) -> None:
    model, reference = mlp(), mlp()
    pairs: list[Any] = list(model.named_parameters())
    first, second = (pairs[:2], [p for _, p in pairs[2:]]) if named_first else ([p for _, p in pairs[:2]], pairs[2:])
    optimizer = made([{"params": first}, {"params": second, "lr": 1e-2}])
    plain = list(reference.parameters())
    groups: list[Any] = [{"params": plain[:2]}, {"params": plain[2:], "lr": 1e-2}]
    theirs = torch.optim.AdamW(groups)
    train(model, optimizer, batches(3))
    train(reference, theirs, batches(3))
    close_to_torch(model, reference)
