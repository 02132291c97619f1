"""The words of torch's optimizers that recipes spell otherwise or do not need: betas, maximize, foreach, fused, …"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fusion_compile.optim._transform import SPECTRAL, Transform, pair_of

MAXIMIZE = "maximize"
"""Key of a parameter group: step uphill."""
BETAS = "betas"
"""Key of a parameter group: torch's pair, which `OneCycleLR` and `CyclicLR` write. Each is a hyperparameter here."""
DECAY = "weight_decay"
"""The number by which trainers tell apart the parameters that decay from biases and norms."""
_SAY_NOTHING = ("foreach", "fused", "capturable")
"""How torch runs its update; the update is one program here, whatever they say."""
_MUST_BE = {"amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}
"""What the other values of these mean is another optimizer."""


def betas_of(transform: Transform) -> tuple[str, ...]:
    """Names of the hyperparameters that ``betas`` stands for: those of the recipe's own argument of that name.

    Of one that has only a momentum on matrices it is this alone, so that a scheduler that cycles momentum finds it.
    """
    has = transform.hyperparameters.keys()
    first = "schedule_free_beta"
    if first in has:
        return first, next((n for n in ("neuron_beta2", "beta2", "scalar_beta2") if n in has), first)
    for pair in (("beta1", "beta2"), ("momentum", "beta2")):
        if has >= set(pair):
            return pair
    return ("momentum",) if "momentum" in has and SPECTRAL in transform.roles else ()


def points_of(transform: Transform) -> tuple[str, str]:
    """In words, what the parameters hold while training with `transform`, which moves them, and what after eval()."""
    if "schedule_free_beta" in transform.hyperparameters:
        return "Schedule-Free's y", "the average x"
    return f"the point at which {transform.name} takes its gradient", "those to deploy"


def gradient_belongs(transform: Transform) -> str:
    """Why no step may be taken in eval mode, and what to do."""
    there, deployed = points_of(transform)
    what = f"the weights are {deployed}, but the gradient belongs at {there}"
    return f"{what}. Call optimizer.train() before the forward pass."


def without_torchs_words(options: Mapping[str, Any], of: str) -> dict[str, Any]:
    """`options` without those that say nothing here. ValueError for one that asks for another optimizer.

    `of`: whose options they are, for the message.
    """
    for name, wanted in _MUST_BE.items():
        if name in options and bool(options[name]) is not wanted:
            raise ValueError(f"{of} sets {name}={options[name]!r}, which no recipe has; leave it out.")
    return {n: value for n, value in options.items() if n not in (*_SAY_NOTHING, *_MUST_BE)}


def split_betas(options: Mapping[str, Any], names: Iterable[str], of: str) -> dict[str, Any]:
    """`options` with ``betas`` as the numbers that it stands for. A number that is given beside it must be the same."""
    named = tuple(names)
    if BETAS not in options or not named:
        return dict(options)
    given = options[BETAS]
    values = tuple(given) if isinstance(given, tuple | list) and len(named) == 1 else pair_of(given)
    if len(values) != len(named):
        raise ValueError(f"{of} sets betas={given!r}, but it has only {named[0]}; set {named[0]} itself.")
    told = dict(zip(named, values, strict=True))
    if differing := next((n for n, v in told.items() if n in options and options[n] != v), None):
        raise ValueError(
            f"{of} sets betas={given!r}, of which {differing} is {told[differing]!r}, and {differing}="
            f"{options[differing]!r}; give it once."
        )
    return {**{n: v for n, v in options.items() if n != BETAS}, **told}


def decay_is_theirs(group: dict[str, Any], used: Collection[str]) -> None:
    """Give a group's ``weight_decay`` the name that it has for the group's parameters, which read the numbers `used`.

    Trainers make a group of biases and norms with ``weight_decay=0.0``, which a recipe for matrices reads as
    ``scalar_weight_decay``.
    """
    own = f"scalar_{DECAY}"
    if DECAY in group and DECAY not in used and own in used and own not in group:
        group[own] = group.pop(DECAY)
