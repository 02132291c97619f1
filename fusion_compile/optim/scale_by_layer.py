"""Multiply the updates of single layers by weights of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    BankInfo,
    BankInfos,
    Context,
    EmptyState,
    Extras,
    Named,
    Number,
    Place,
    State,
    Transform,
    by_name,
    declare,
)

LAYER = r"(?:layers|blocks)\.(\d+)\."
"""Finds the number of the layer in a parameter's full name: its first group."""

# Start of each stretch of a bank's leading dimension, and the weight of its layer (None: 1).
Runs = tuple[tuple[int, Named | None], ...]


def scale_by_layer(multipliers: Mapping[int, Number], pattern: str = LAYER) -> Transform:
    """Multiply the updates of layer N by ``multipliers[N]``; all other parameters by 1.

    Put it last, or at least after everything that normalizes updates and would cancel it. Stacked and flat banks alike;
    keeps nothing. The places of parameters are known once the transform is bound, which `compile_training_step` does.
    **Before that it is the identity**, because bare tensors have no names.
    Source: FusionOpt's ``layer_update_weights``. Deviations: ``blocks.N.`` counts as a layer too, flat banks are scaled
    like matrices, and an unknown layer is refused.

    Args:
        multipliers: By layer number; each is live as ``layer_weight.<N>``. 0 stops a layer (its decay too, if that
            stands before).
        pattern: Regular expression that is searched in the parameters' full names; its first group is the number.

    Returns:
        A transform without a step. Binding it raises ValueError for a number that no parameter has.

    Raises:
        ValueError: `pattern` has no group.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.chain(optim.adamw(1e-3), optim.scale_by_layer({0: 0.5, 11: 2.0}))
        >>> optimizer.hyperparameters["layer_weight.11"]
        2.0
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

    def bind(infos: BankInfos) -> Transform:
        return _scale_by_layer(weights, pattern, _find_runs(infos, weights, pattern))

    pools = "the table of layers, which the names of all parameters make,"
    extras = Extras("scale_by_layer", by_name(*weights.values()), bind=bind, after_step=True, pools=pools)
    return Transform(init, update, extras)


def _factors(u: Tensor, runs: Runs, hyperparameters: Mapping[str, Tensor]) -> Tensor:
    """One factor for each index of the leading dimension, shaped to multiply `u`."""
    one = torch.ones((), dtype=u.dtype, device=u.device)
    ends = [start for start, _ in runs[1:]] + [u.shape[0]]
    parts = [
        (one if weight is None else hyperparameters[weight.name].to(u.dtype)).expand(end - start)
        for (start, weight), end in zip(runs, ends, strict=True)
    ]
    return torch.cat(parts).view(-1, *[1] * (u.ndim - 1))


def _find_runs(infos: BankInfos, weights: Mapping[int, Named], pattern: str) -> dict[str, Runs]:
    """The stretches of every bank that holds a listed layer; their number grows with the layers, not the parameters."""
    found: set[int] = set()
    runs: dict[str, Runs] = {}
    for key, info in infos.items():
        layers = {place.at: _layer(place.name, pattern) for place in _in_order(info)}
        found |= {n for n in layers.values() if n is not None}
        here: list[tuple[int, Named | None]] = []
        for at, n in layers.items():
            weight = None if n is None else weights.get(n)
            if not here or here[-1][1] != weight:
                here.append((at, weight))
        if any(weight is not None for _, weight in here):
            runs[key] = tuple(here)
    missing = sorted(set(weights) - found)
    if missing and any(info.places for info in infos.values()):
        example = next(place.name for info in infos.values() for place in info.places)
        there = ", ".join(map(str, sorted(found))) if found else f"none (the names look like {example})"
        raise ValueError(
            f"scale_by_layer() lists layer {', '.join(map(str, missing))}, but by the pattern {pattern!r} the layers "
            f"of its parameters are {there}; correct the numbers or the pattern, or leave it out of this part."
        )
    return runs


def _in_order(info: BankInfo) -> list[Place]:
    return sorted(info.places, key=lambda place: place.at)


def _layer(name: str, pattern: str) -> int | None:
    match = re.search(pattern, name)
    return None if match is None else int(match[1])
