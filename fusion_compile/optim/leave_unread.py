"""Parameters that a loss reads in some steps only: left alone in the others, each with counts of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import BankInfos, Context, State, Transform, bound, check_transform


class OwnNumber(NamedTuple):
    """A plain number of a state (a count, β₁ᵗ), which each parameter has for itself. `by_bank`: one for every matrix of
    a stacked bank, and for every so many entries of a flat one."""

    by_bank: Tensors


def leave_unread(base: Transform) -> Transform:
    """`base`, whose plain numbers (a count, β₁ᵗ, a sum of weights) every parameter keeps for itself.

    A training step then leaves a parameter alone in each step whose loss does not read it: weights, state and counts
    stay, and nothing decays. So does torch.optim, which skips a parameter without a gradient and counts the steps of
    each. With one count for all, Adam's correction would be over when a late parameter is read for the first time, and
    its first update 3.2 times as long. For task heads in turn, layers that are dropped at random, parts that join
    later. Any shape; a flat bank keeps each number once for every 4 entries or more.
    Source: torch.optim, where ``p.grad`` is None. Deviations: none.

    Args:
        base: A whole optimizer, whose update of a parameter needs no other one.

    Returns:
        A transform with the roles, numbers and step of `base`.

    Raises:
        TypeError: `base` is no transform.
        ValueError: `base` pools over parameters, works every K steps, or shows diagnostics of all parameters.

    Example:
        >>> import torch, fusion_compile as fc
        >>> heads = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 2), "b": torch.nn.Linear(4, 3)})
        >>> step = fc.compile_training_step(
        ...     heads, lambda m, x, task: m[task](x).square().mean(),
        ...     optimizer=fc.optim.leave_unread(fc.optim.adamw(1e-2)), mode="eager",
        ... )
        >>> before = heads["b"].weight.clone()
        >>> loss = step(torch.randn(8, 4), "a")
        >>> torch.equal(heads["b"].weight, before)
        True
    """
    check_transform("leave_unread(), base,", base)
    for reason in filter(None, _reasons(base)):
        raise ValueError(
            f"leave_unread() was given {base.name}, {reason}, so a parameter cannot be left alone in it. Give a recipe "
            f"that updates each parameter by itself, such as adamw, lion or sf_adamw."
        )
    return _with_own_numbers(base, {})


def _reasons(base: Transform) -> Iterable[str]:
    yield base.extras.pools and f"which needs {base.extras.pools} of all parameters"
    yield f"which works on its state every {base.periodic[0].every} steps" if base.periodic else ""
    yield f"which singles out every {base.period} steps" if base.period else ""
    yield "which shows numbers of all parameters" if base.diagnostics is not None else ""


def _with_own_numbers(base: Transform, infos: BankInfos) -> Transform:
    def rows(key: str, bank: Tensor) -> int:
        """How many of each number a bank keeps."""
        if bank.ndim > 1:
            return bank.shape[0]
        starts = [place.at for place in infos[key].places] if key in infos else []
        return bank.shape[0] // math.gcd(bank.shape[0], *starts) if bank.shape[0] else 0

    def init(params: Tensors) -> State:
        return _spread(base.init(params), {key: (bank, rows(key, bank)) for key, bank in params.items()})

    def update(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        moved: Tensors = {}
        after: dict[str, State] = {}
        for key, g in updates.items():
            own = _of_bank(state, key, params)
            part, after[key] = base.update({key: g}, own, {key: params[key]}, context)
            moved |= part
        return moved, _together(state, after, params)

    gradient_point = None
    if (move := base.gradient_point) is not None:

        def gradient_point(params: Tensors, state: State, context: Context) -> Tensors:
            points: Tensors = {}
            for key, bank in params.items():
                points |= move({key: bank}, _of_bank(state, key, params), context)
            return points

    bind: Callable[[BankInfos], Transform] = lambda infos: _with_own_numbers(bound(base, infos), infos)  # noqa: E731
    extras = base.extras._replace(gradient_point=gradient_point, bind=bind, leaves_unread=True)
    return Transform(init, update, extras)


def _spread(tree: Any, banks: dict[str, tuple[Tensor, int]]) -> Any:
    """A state with each of its plain numbers once for every parameter."""
    if isinstance(tree, Tensor):
        return OwnNumber({key: tree.expand(rows).clone() for key, (_, rows) in banks.items()})
    if _is_by_bank(tree, banks):
        if any(not t.ndim for t in tree.values()):
            raise ValueError("leave_unread() was given an optimizer that keeps one number for a bank of parameters.")
        return tree
    return _mapped(lambda child: _spread(child, banks), tree)


def _of_bank(tree: Any, key: str, banks: Tensors) -> Any:
    """The part of a state that is about one bank. Numbers have a form that broadcasts over it."""
    if isinstance(tree, OwnNumber):
        own, bank = tree.by_bank[key], banks[key]
        if bank.ndim > 1:
            return own.view(-1, *[1] * (bank.ndim - 1))
        return own[:, None].expand(-1, bank.shape[0] // max(1, own.shape[0])).reshape(-1)
    if _is_by_bank(tree, banks):
        return {key: tree[key]} if key in tree else {}
    return _mapped(lambda child: _of_bank(child, key, banks), tree)


def _together(tree: Any, parts: dict[str, Any], banks: Tensors) -> Any:
    """A state like `tree` from those of single banks. What a bank's update returned as it was given is no news."""
    if isinstance(tree, OwnNumber):
        return OwnNumber({key: _number(old, parts[key]) for key, old in tree.by_bank.items()})
    if _is_by_bank(tree, banks):
        return {key: parts[key][key] for key in tree}
    if isinstance(tree, dict):
        return {k: _together(child, {key: part[k] for key, part in parts.items()}, banks) for k, child in tree.items()}
    children = [_together(child, {key: part[i] for key, part in parts.items()}, banks) for i, child in enumerate(tree)]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)


def _number(old: Tensor, new: Tensor) -> Tensor:
    """One number for each row of `old`, from what broadcasts over the bank."""
    if not new.ndim:
        return new.expand(old.shape)
    return new.reshape(-1)[:: max(1, new.numel() // max(1, old.numel()))]


def _is_by_bank(tree: Any, banks: Iterable[str]) -> bool:
    return isinstance(tree, dict) and bool(tree) and set(tree) <= set(banks)


def _mapped(fn: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: fn(child) for k, child in tree.items()}
    return type(tree)(*map(fn, tree)) if hasattr(tree, "_fields") else tuple(map(fn, tree))
