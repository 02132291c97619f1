"""Parameters, groups and options as torch.optim takes them: routed by name, checked, refused with a sentence."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile.optim import Extras, Transform
from tests.torch_loops import (
    made,
)


def test_names_route_as_modules_do_where_they_can() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok_embed = nn.Embedding(200, 128)
            self.body = nn.Linear(128, 256, bias=False)
            self.inner = nn.Linear(256, 128)
            self.lm_head = nn.Linear(128, 200)

        def forward(self, i: Tensor) -> Tensor:
            out: Tensor = self.lm_head(self.inner(self.body(self.tok_embed(i))))
            return out

    roles = []
    for by_name in (False, True):
        model = Net()
        optimizer = made(model.named_parameters() if by_name else model, "muon")
        model(torch.arange(4)).sum().backward()
        optimizer.step()
        roles.append({r.name: r.role for r in optimizer.routes})
    assert roles[0] == roles[1]
    assert {n for n, role in roles[0].items() if role == "spectral"} == {"body.weight", "inner.weight"}
    model = Net()
    optimizer = made(model.named_parameters(), "muon", force_scalar=["^body"], force_spectral=["tok_embed"])
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    assert {r.name for r in optimizer.routes if r.role == "spectral"} == {"tok_embed.weight", "inner.weight"}


def not_a_leaf() -> list[Any]:
    return [("w", torch.ones(2, requires_grad=True) * 2)]


def twice() -> list[Any]:
    p = nn.Parameter(torch.ones(2))
    return [("a", p), ("b", p)]


BARE = Transform(dict, lambda updates, state, params, context: (updates, state), Extras("bare", descends=True))


def one() -> list[Any]:
    return [("w", nn.Parameter(torch.ones(2)))]


@pytest.mark.parametrize(
    ("transform", "params", "options", "error", "words"),
    [
        ("adamw", [], {}, ValueError, "was given no parameters"),
        ("adamw", twice(), {}, ValueError, r"b \[2\] is given twice, first as a"),
        ("adamw", [{"params": twice()[:1]}, {"params": [("c", 3)]}], {}, TypeError, "c is a int"),
        ("adamw", not_a_leaf(), {}, ValueError, r"w \[2\] is the result of a computation"),
        ("adamw", [{"params": one(), "betas": 0.9}], {}, TypeError, "betas=0.9 is not a pair"),
        (BARE, [{"params": one(), "betas": (0.9, 0.9)}], {}, ValueError, "sets 'betas', which bare does not have"),
        ("adamw", [{"params": one(), "weight_decy": 0.0}], {}, ValueError, "Did you mean 'weight_decay'"),
        ("adamw", [{"params": one(), "lr": torch.ones(2)}], {}, TypeError, r"sets 'lr' to a tensor \[2\]"),
        ("adam", one(), {}, ValueError, "optimizer='adam' is not a recipe"),
        (3, one(), {}, TypeError, "optimizer is a int"),
        ("adamw", one(), {"mode": "fast"}, ValueError, "mode='fast' is not known"),
        ("muon", one(), {"force_scalar": ["x"]}, ValueError, "force_scalar: 'x' matches no trainable parameter"),
        ("muon", one(), {"force_scalar": "x"}, TypeError, "is a string; give a list"),
        ("muon", [{"params": one(), "momentum": 0.5}], {}, ValueError, "group 0 sets 'momentum', but muon"),
        ("muon", one(), {"lr": 1.0}, ValueError, "the optimizer sets 'lr', but muon does not read it for these"),
        ("adamw", 3, {}, TypeError, "params is a int; give the model, model.named_parameters()"),
        ("adamw", None, {}, TypeError, "params is a NoneType"),
        ("adamw", torch.ones(2), {}, TypeError, "params is a Tensor"),
        ("adamw", nn.Linear(1, 1).state_dict(), {}, TypeError, "params is a OrderedDict"),
        ("adamw", [{"lr": 1.0}], {}, ValueError, "parameter group 0 lacks 'params'; it has lr"),
        ("adamw", one(), {"force_scalar": 3}, TypeError, "force_scalar is a int; give a list"),
        ("adamw", one(), {"backend": 3}, TypeError, "backend=3 is not a name"),
        (BARE, one(), {"lr": 1.0}, ValueError, "bare has no hyperparameter 'lr'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    transform: Any, params: Any, options: Any, error: type[Exception], words: str
) -> None:
    def use() -> None:
        optimizer = made(params, transform, **options)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()

    with pytest.raises(error, match=words):
        use()


def test_an_empty_group_and_a_key_of_other_make_are_fine() -> None:
    """As HF's groups with and without decay, and timm's ``lr_scale``."""
    p = nn.Parameter(torch.ones(2))
    optimizer = made([{"params": [], "weight_decay": 0.0}, {"params": [p], "lr_scale": 0.5, "name": "head"}])
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert float(p.detach()[0]) < 1 and optimizer.param_groups[1]["name"] == "head"
