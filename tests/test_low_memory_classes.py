"""The low-memory recipes as classes: their steps are the training step's, in bf16 too, their options the recipes'."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fusion_compile as fc
from fusion_compile import low_memory_classes, optim
from fusion_compile.optim._registry import names
from fusion_compile.optimizer_classes import _OfRecipe
from tests.small_models import batches, compiled, mlp, squared_error

CLASSES: dict[str, Any] = {
    kind._recipe: kind
    for kind in vars(low_memory_classes).values()
    if isinstance(kind, type) and issubclass(kind, _OfRecipe) and kind is not _OfRecipe
}
# Their parameters hold the gradient point, and the weights need a bank of their own: refused without a master.
MOVING = {n for n in CLASSES if optim.create(n).gradient_point is not None}
DATA = batches(3, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in MOVING])
@pytest.mark.parametrize("half_precision", ["exact", "stochastic"])
def test_its_steps_are_the_training_steps(name: str, half_precision: str) -> None:
    torch.manual_seed(0)
    step = compiled(mlp(torch.bfloat16), optimizer=optim.create(name), mode="eager", half_precision=half_precision)
    torch.manual_seed(0)
    model = mlp(torch.bfloat16)
    optimizer = CLASSES[name](model, half_precision=half_precision, mode="eager")
    for x, y in DATA:
        step(x, y)
        optimizer.zero_grad()
        squared_error(model, x, y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), model.parameters(), strict=True))
    assert getattr(optim, CLASSES[name].__name__) is CLASSES[name]


def test_every_recipe_is_a_class() -> None:
    of_all = {
        c._recipe
        for c in vars(optim).values()
        if isinstance(c, type) and issubclass(c, _OfRecipe) and c is not _OfRecipe
    }
    assert of_all == {name for name in names() if hasattr(optim, name)}  # other tests register their own

    class Lion(optim.AdamW):
        """A user's own."""

    assert Lion._recipe == "adamw"


def test_nekaon_shows_its_point_while_training_and_the_weights_in_eval() -> None:
    step = compiled(mlp(), optimizer=optim.create("nekaon"), mode="eager")
    model = mlp()
    optimizer = optim.Nekaon(model, mode="eager")
    for x, y in batches(3):
        step(x, y)
        optimizer.zero_grad()
        squared_error(model, x, y).backward()
        optimizer.step()
    point = step.gradient_point()
    assert all(torch.equal(p, point[n]) for n, p in model.named_parameters())
    optimizer.eval()
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), model.parameters(), strict=True))


def test_trainers_words_pickles_and_unknown_ones() -> None:
    model = nn.Linear(64, 8)
    options: dict[str, Any] = {"lr": 2e-4, "momentum": "4bit"}
    optimizer = fc.optim.Adakaon([{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-3}], **options)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 1e-3]
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.defaults["lr"] == 2e-4 and again._inside.transform.extras.stored == {"mu": "4bit"}
    with pytest.raises(TypeError, match=r"Adakaon: .*'momentun'; its options are those of optim.adakaon"):
        fc.optim.Adakaon(model, momentun="int8")
    with pytest.raises(ValueError, match=r"more than one|twice|given"):
        fc.optim.Adakaon([{"params": [model.weight]}, {"params": [model.weight]}])


def test_a_dit_in_bf16_takes_three_bytes_in_all() -> None:
    """2 of the weights, 1 of int8 momenta, scales; and 2 more with the exact weights."""
    shapes = [(1152, 384), (384, 384), (1536, 384), (384, 1536), (2304, 384), (1152,), (384,), (2304,)]
    for half_precision, most in (("stochastic", 3.1), ("exact", 5.1)):
        for make in (lambda: optim.normuon(momentum="int8", second_moment="int8"), lambda: optim.lion(momentum="int8")):
            model = nn.Module()
            for i, shape in enumerate(shapes):
                model.register_parameter(f"p{i}", nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)))
            step = compiled(model, optimizer=make(), half_precision=half_precision, mode="eager")
            kept = ("params", "module", "optimizer", "mantissa", "compensation")
            held = sum(t.nbytes for key, t in step._state.items() if key.split("/")[0] in kept)
            assert held / sum(p.numel() for p in model.parameters()) <= most
