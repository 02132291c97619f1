"""The update of a part of a bank by a program that serves many such parts, one after another.

What distinguishes two parts (their memory, their names) comes to the program as tensors. Numbers that all parameters of
a group share (powers of β, counts) have the value of before the step for each part; the new value is written beside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._state import flat_tree, keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.half_precision import COUNT, SEED, noise_for, weights_of
from fusion_compile._step.update import UpdatePlan
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile._torch_optim.update_program import Arrivals, Turn, update_of
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Transform, bound

NEXT = "next/"
"""Before the key of a shared number: its value after the step that is under way."""


class Form(NamedTuple):
    """What all parts of one form share. `names`: what stands for the name of the one that is updated. `paths`: the
    entries of the transform's state."""

    key: Hashable
    plan: UpdatePlan
    names: Tensor
    paths: frozenset[str]

    def own(self, state: Tensors, after: Tensors) -> Tensors:
        """What of `state`, a part's, the program takes, with the places of new shared numbers, which `after` has."""
        own = {k: t for k, t in state.items() if k in self.paths or keys.split(k)[0] != keys.OPTIMIZER}
        return own | {f"{NEXT}{k}": after[f"{NEXT}{k}"] for k in own if f"{NEXT}{k}" in after}


def form_of(
    kind: Hashable, transform: Transform, half_precision: str, group: ParameterGroup, layout: Layout, state: Tensors
) -> Form:
    """The form `kind` of a part, which is the one bank of `layout` and has `state`. `transform` knows no banks yet."""
    (bank,) = layout.banks
    names = torch.zeros(len(layout.infos[bank.key].places), dtype=torch.int64, device=layout.device)
    infos = {key: info._replace(names=names) for key, info in layout.infos.items()}
    transform = bound(transform, infos)
    with warnings.catch_warnings():  # the group's own banks have been warned of
        warnings.simplefilter("ignore")
        fresh = transform.init({bank.key: weights_of(bank, state)})
    held = state.get(keys.module(bank.key), state.get(keys.params(bank.key)))
    assert held is not None
    noise = noise_for(half_precision, layout, {bank.key: held}, infos)
    paths = frozenset(dict(flat_tree.flatten(fresh, keys.OPTIMIZER))) | {COUNT, SEED}
    plan = UpdatePlan(layout, transform, flat_tree.form(fresh, keys.OPTIMIZER), group.hyperparameters, noise)
    return Form(kind, plan, names, paths)


def update_of_one(plan: UpdatePlan, due: bool) -> Callable[..., Tensors]:
    """The update of a part as a function of its state, its gradient by bank, and the loss if there is one."""
    turn = Turn(0, due, False)

    def advance(state: Tensors, gradients: Tensors, loss: Tensor | None = None) -> Tensors:
        new = update_of(plan, turn, state, Arrivals(keys.of_group(0, gradients), {}, loss))
        return {f"{NEXT}{key}" if f"{NEXT}{key}" in state else key: value for key, value in new.items()}

    return advance


def is_shared(layout: Layout, key: str, tensor: Tensor) -> bool:
    """Whether all parameters of a group share the number under `key`."""
    return keys.split(key)[0] == keys.OPTIMIZER and not tensor.ndim and layout.bank_of(key) is None
