"""A weight of its own for the updates of single layers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    BankFacts,
    Context,
    EmptyState,
    Facts,
    Member,
    Named,
    Scalar,
    State,
    Transform,
    declare,
)

LAYER = r"(?:layers|blocks)\.(\d+)\."
"""Finds the number of the layer in a parameter's full name: its first group."""

# Where a stretch of a bank's leading dimension begins, and the weight of the layer that it belongs to (None: 1).
Runs = tuple[tuple[int, Named | None], ...]


def scale_by_layer(multipliers: Mapping[int, Scalar], pattern: str = LAYER) -> Transform:
    """Multiply the updates of layer N by ``multipliers[N]``; all other parameters by 1.

    Every multiplier is live as ``layer_weight.<N>``; 0 stops a layer (its decay too, when that stands before). Put it
    last, or at least after whatever normalizes updates and would cancel it. `pattern` is searched in the parameters'
    full names. Stacked and flat banks alike; keeps nothing.

    Which parameters lie where in a bank is known once the transform is bound, as `compile_training_step` does. **Before
    that it is the identity**, as bare tensors have no names. Binding raises ValueError for a number that no parameter
    has.
    Source: FusionOpt's ``layer_update_weights``. Deviations: ``blocks.N.`` counts as a layer too, flat banks are scaled
    like matrices, and an unknown layer is refused.
    """
    if re.compile(pattern).groups < 1:
        raise ValueError(f"pattern={pattern!r} has no group; the layer's number is its first, as in {LAYER!r}.")
    weights = {n: declare(f"layer_weight.{n}", value) for n, value in multipliers.items()}
    return _scale_by_layer(weights, pattern, {})


def _scale_by_layer(weights: Mapping[int, Named], pattern: str, runs: Mapping[str, Runs]) -> Transform:
    def init(params: Tensors) -> EmptyState:
        return EmptyState()

    def update(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        scaled = {
            k: u * _factors(u, runs[k], context.hyperparameters) if k in runs else u.clone() for k, u in updates.items()
        }
        return scaled, state

    def bind(facts: Facts) -> Transform:
        return _scale_by_layer(weights, pattern, _find_runs(facts, weights, pattern))

    hyperparameters = {w.name: w.value for w in weights.values()}
    return Transform(init, update, hyperparameters, name="scale_by_layer", bind=bind)


def _factors(u: Tensor, runs: Runs, hyperparameters: Mapping[str, Tensor]) -> Tensor:
    """One factor for each index of the leading dimension, shaped to multiply `u`."""
    one = torch.ones((), dtype=u.dtype, device=u.device)
    ends = [start for start, _ in runs[1:]] + [u.shape[0]]
    parts = [
        (one if weight is None else hyperparameters[weight.name].to(u.dtype)).expand(end - start)
        for (start, weight), end in zip(runs, ends, strict=True)
    ]
    return torch.cat(parts).view(-1, *[1] * (u.ndim - 1))


def _find_runs(facts: Facts, weights: Mapping[int, Named], pattern: str) -> dict[str, Runs]:
    """The stretches of every bank that holds a listed layer: as many as its layers make, not as it has parameters."""
    found: set[int] = set()
    runs: dict[str, Runs] = {}
    for key, bank in facts.items():
        layers = {m.at: _layer(m.name, pattern) for m in _in_order(bank)}
        found |= {n for n in layers.values() if n is not None}
        here: list[tuple[int, Named | None]] = []
        for at, n in layers.items():
            weight = None if n is None else weights.get(n)
            if not here or here[-1][1] != weight:
                here.append((at, weight))
        if any(weight is not None for _, weight in here):
            runs[key] = tuple(here)
    missing = sorted(set(weights) - found)
    if missing and any(bank.members for bank in facts.values()):
        example = next(m.name for bank in facts.values() for m in bank.members)
        there = ", ".join(map(str, sorted(found))) if found else f"none (the names look like {example})"
        raise ValueError(
            f"scale_by_layer() lists layer {', '.join(map(str, missing))}, but by the pattern {pattern!r} the layers "
            f"of its parameters are {there}; correct the numbers or the pattern, or leave it out of this part."
        )
    return runs


def _in_order(bank: BankFacts) -> list[Member]:
    return sorted(bank.members, key=lambda member: member.at)


def _layer(name: str, pattern: str) -> int | None:
    match = re.search(pattern, name)
    return None if match is None else int(match[1])
