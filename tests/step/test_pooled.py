"""Which optimizers need all gradients before they update one parameter: declared, found by a trial, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile import optim
from fusion_compile._step.pooled import _is_apart, refuse_pooled
from fusion_compile.optim._registry import factory_of, names
from fusion_compile.optim._transform import Transform

REASONS = {
    "prodigy": "d, which sums over all gradients estimate",
    "autokaon": "its scale, which all gradients teach",
    "fusionopt_compat": "γ, from the loss and the mean of all gradients",
}
WRAPPED: dict[str, tuple[Any, str]] = {
    "clip": (lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.adamw()), "the norm of all gradients"),
    "autoscale": (lambda: optim.autoscale(optim.adamw()), "d, which sums"),
    "mechanic": (lambda: optim.mechanic(optim.adamw(1.0)), "its scale"),
    "ratio": (lambda: optim.scale_lr_by_loss_ratio(optim.adamw()), "its rate, from the mean of all gradients"),
    "plus": (lambda: optim.schedule_free_plus(optim.chain(optim.scale_by_learning_rate(1.0))), "its rate, from sums"),
    "stored": (lambda: optim.stored(optim.prodigy(), mu="int8"), "d, which sums"),
}


@pytest.mark.parametrize("name", names())
def test_a_recipe_declares_what_a_trial_finds(name: str) -> None:
    """A recipe that declares nothing updates parameters apart from each other; the three that declare are refused."""
    factory = factory_of(name)
    assert factory is not None
    transform = factory()
    if name in REASONS:
        with pytest.raises(ValueError, match=f"release_gradients=True: .*because {REASONS[name]}.* whole backward"):
            refuse_pooled(transform)
    else:
        assert not transform.extras.pools and _is_apart(transform)
        refuse_pooled(transform)


@pytest.mark.parametrize("which", WRAPPED)
def test_parts_that_pool_are_refused_wherever_they_stand(which: str) -> None:
    make, reason = WRAPPED[which]
    with pytest.raises(ValueError, match=reason):
        refuse_pooled(make())


def test_a_part_of_somebody_elses_that_pools_is_found() -> None:
    """Global clipping, written by hand and not declared."""

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        norm = torch.stack([u.square().sum() for u in updates.values()]).sum().sqrt()
        return {k: u / norm for k, u in updates.items()}, state

    clip = Transform(lambda params: optim.EmptyState(), update, optim.Extras("mine"))
    mine = optim.chain(clip, optim.adamw())
    with pytest.raises(ValueError, match="the update of one parameter, which changes with others' gradients"):
        refuse_pooled(mine)
    refuse_pooled(optim.chain(optim.scale_by_adam(), optim.scale_by_learning_rate(1e-3)))


def test_what_cannot_be_tried_is_refused() -> None:
    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        return {k: u * context.loss for k, u in updates.items()}, state

    by_loss = Transform(lambda params: optim.EmptyState(), update, optim.Extras("by_loss"))
    with pytest.raises(ValueError, match=r"by_loss.* could not be tried on two parameters"):
        refuse_pooled(optim.chain(by_loss, optim.scale_by_learning_rate(1e-3), name="by_loss"))


def test_a_refusal_comes_when_the_optimizer_is_made() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="prodigy cannot update a parameter as soon as its gradient arrives"):
        optim.Prodigy(model, release_gradients=True)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
