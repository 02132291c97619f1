"""Validate torch.optim-style parameters (named or not), groups and options, and route the parameters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fusion_compile._state.routing import Route, refuse_roles, route
from fusion_compile._torch_optim.parameter_group import holder
from fusion_compile._torch_optim.torch_words import MAXIMIZE
from fusion_compile.optim._transform import ELEMENTWISE, SPECTRAL, Transform

STEPS = "steps"
"""Key of a parameter group: the steps it has taken."""

_TABLE_NAME = re.compile(r"(^|\.)[^.]*(emb|wte|wpe|vocab|shared)[^.]*(\.weight)?$")
"""Names of embedding tables, for parameters that come without their modules."""

_TORCH_OPTIONS = ("lr", "betas", "momentum", "eps", "weight_decay", "nesterov", "dampening", "alpha", "centered")
"""Options of torch's optimizers. Ignoring one that a transform lacks would be a silent mistake."""


def names_of(given: Sequence[Any], at: int) -> list[str]:
    """Full names of the parameters of group `at`; for parameters without names the expression that leads to them."""
    return [e[0] if isinstance(e, tuple) else f"param_groups[{at}]['params'][{i}]" for i, e in enumerate(given)]


def check_parameters(given: Sequence[Any], at: int, taken: Mapping[int, str]) -> None:
    """Refuse what group `at` cannot hold. `taken`: names of the parameters of other groups, by id."""
    seen = dict(taken)
    for name, entry in zip(names_of(given, at), given, strict=True):
        p = entry[1] if isinstance(entry, tuple) else entry
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} is a {type(p).__name__}; an optimizer takes parameters.")
        if id(p) in seen:
            raise ValueError(f"{name} {list(p.shape)} is given twice, first as {seen[id(p)]}; name it once.")
        if not p.is_leaf:
            raise ValueError(
                f"{name} {list(p.shape)} is the result of a computation and not a leaf; give the parameters that it "
                f"was computed from."
            )
        seen[id(p)] = name


def check_options(group: Mapping[str, Any], at: int, transform: Transform) -> None:
    """Refuse an option of group `at` that would be ignored silently. Other keys are left alone."""
    known = transform.hyperparameters
    for key in group:
        if key in known or key in ("params", STEPS, MAXIMIZE):
            continue
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.8)
        if close or key in _TORCH_OPTIONS:
            raise ValueError(
                f"parameter group {at} sets {key!r}, which {transform.name} does not have; it has {', '.join(known)}."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )


def check_patterns(
    named: Mapping[str, nn.Parameter], transform: Transform, force_scalar: Sequence[str], force_spectral: Sequence[str]
) -> None:
    """Refuse patterns without effect: those that match no parameter of any group, or that contradict each other."""
    if any(p.requires_grad for p in named.values()):
        route(holder(named), transform.roles or (ELEMENTWISE,), force_scalar, force_spectral)


def group_routes(
    members: Mapping[str, nn.Parameter],
    model: nn.Module | None,
    known: Mapping[str, Route],
    transform: Transform,
    force_scalar: Sequence[str],
    force_spectral: Sequence[str],
) -> tuple[Route, ...]:
    """Route one group's `members`: as `known`, else by the modules of `model`, else by their names."""
    roles = transform.roles or (ELEMENTWISE,)
    rest = {n: p for n, p in members.items() if n not in known}
    frozen = [p for p in rest.values() if not p.requires_grad]
    try:
        for p in frozen:  # they have a gradient all the same, and route() skips frozen parameters
            p.requires_grad_(True)
        found = {r.name: r for r in _routes_of(rest, model, transform, force_scalar, force_spectral)} if rest else {}
    finally:
        for p in frozen:
            p.requires_grad_(False)
    routes = tuple({**known, **found}[n] for n in members)
    refuse_roles(routes, roles, transform.name)
    return routes


def _routes_of(
    members: Mapping[str, nn.Parameter],
    model: nn.Module | None,
    transform: Transform,
    force_scalar: Sequence[str],
    force_spectral: Sequence[str],
) -> Iterable[Route]:
    roles, max_aspect = transform.roles or (ELEMENTWISE,), transform.extras.max_aspect
    if model is not None:
        names = {id(p): n for n, p in model.named_parameters()}
        if all(id(p) in names for p in members.values()):
            found = {r.name: r for r in route(model, roles, force_scalar, force_spectral, max_aspect)}
            return [replace(found[names[id(p)]], name=n) for n, p in members.items()]

    def matching(patterns: Sequence[str]) -> list[str]:
        return [f for f in patterns if any(re.search(f, n) for n in members)]

    routes = route(holder(members), roles, matching(force_scalar), matching(force_spectral), max_aspect)
    return [
        replace(r, role=ELEMENTWISE, reason="embedding, by its name")
        if r.role == SPECTRAL and not r.reason.startswith("force_spectral") and _TABLE_NAME.search(r.name)
        else r
        for r in routes
    ]


def refuse_other_kinds(params: Any) -> None:
    """Raise TypeError for what holds no parameters, or holds them under keys."""
    if isinstance(params, nn.Module):
        return
    if isinstance(params, Tensor | Mapping) or not isinstance(params, Iterable):
        remedy = "give the model, model.named_parameters(), or a list of groups [{'params': …}]"
        raise TypeError(f"params is a {type(params).__name__}; {remedy}.")


def refuse_the_wrong_way_round(params: Any, optimizer: Any) -> None:
    """Raise TypeError where `params` is an optimizer, or `optimizer` a module."""
    chosen = isinstance(params, str | Transform) or (callable(params) and not isinstance(params, nn.Module))
    if chosen or isinstance(optimizer, nn.Module):
        got = f"the first argument is {params!r}" if isinstance(params, str) else f"params is a {type(params).__name__}"
        if not chosen:
            got = f"optimizer is a {type(optimizer).__name__}, a module"
        raise TypeError(
            f"{got}; parameters come first and the optimizer second: as_torch_optimizer(model, 'sf_normuon')."
        )
