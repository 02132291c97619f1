"""What is fixed about a step's update before anything runs: the transform, the routes, the banks and the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from fusion_compile._state import flat_tree, keys
from fusion_compile._state.banks import Layout, build_layout
from fusion_compile._state.blocks import SplitBlocks, cut_blocks
from fusion_compile._state.groups import assign, numbers_of, read_groups, refuse_unread
from fusion_compile._state.half_precision import alignment_of, refuse_banks
from fusion_compile._state.routing import Route, refuse_roles, route
from fusion_compile._step.numbers_used import numbers_used
from fusion_compile._step.pure_step import CLIP
from fusion_compile.optim._grouped import banks_of, grouped
from fusion_compile.optim._resolve import OptimizerChoice, resolve_optimizer, with_rate
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import ELEMENTWISE, BankInfos, Transform, bound
from fusion_compile.optim.averaged import Average, averaged


class Forced(NamedTuple):
    """What people say of routes: expressions for the scalar and the spectral role, and the blocks of fused matrices."""

    scalar: Sequence[str] = ()
    spectral: Sequence[str] = ()
    blocks: SplitBlocks = None


class Planned(NamedTuple):
    """A transform that knows its banks, and the numbers that it declares with those of groups and of the step.

    `bind`: the same transform for other banks, of which the infos are given (a rank's part of the model's).
    """

    transform: Transform
    routes: tuple[Route, ...]
    layout: Layout
    numbers: dict[str, float | Schedule]
    bind: Callable[[BankInfos], Transform]


def plan_update(
    model: nn.Module,
    optimizer: OptimizerChoice,
    lr: float | Schedule | None,
    groups: Sequence[Mapping[str, Any]],
    clip_grad_norm: float | None,
    forced: Forced,
    half_precision: str = "master",
    averages: Sequence[Average] = (),
) -> Planned:
    """Resolve the arguments of ``compile_training_step`` that say what the optimizer does to which parameter.

    Raises TypeError or ValueError for what does not fit together; nothing has happened then.
    """
    transform = resolve_optimizer(optimizer)
    named = read_groups(groups, transform.hyperparameters, transform.name)
    numbers = {**with_rate(transform, lr), **numbers_of(named)}
    if CLIP in numbers:
        raise ValueError(
            f"{transform.name} declares the hyperparameter {CLIP!r}, which is the step's own bound on the gradient "
            f"norm; one of the two would be silent. Give the optimizer's another name: Named('max_norm', 1.0)."
        )
    numbers[CLIP] = float("inf") if clip_grad_norm is None else clip_grad_norm
    roles = transform.roles or (ELEMENTWISE,)
    routes = route(model, roles, forced.scalar, forced.spectral, transform.extras.max_aspect)
    refuse_roles(routes, roles, transform.name)
    routes = assign(cut_blocks(routes, model, forced.blocks), named)
    layout, whole = banks_for(transform, model, routes, half_precision)
    refuse_banks(half_precision, layout)
    empty = layout.without_data()
    if lr is not None and (used := numbers_used(whole, empty)) is not None:
        refuse_unread("the step", ["lr"], used, transform.name)
    for group in named:
        banks = banks_of(empty, group.name)
        if (used := numbers_used(whole, banks)) is not None:
            refuse_unread(f"group {group.name!r}", group.numbers, used, transform.name)

    def together(of_banks: Transform) -> Transform:
        in_groups = grouped(of_banks, {g.name: g.numbers for g in named}) if named else of_banks
        return averaged(in_groups, averages) if averages else in_groups

    numbers |= {average.number: average.rate for average in averages if average.number}
    return Planned(together(whole), routes, layout, numbers, lambda infos: together(bound(transform, infos)))


def banks_for(
    transform: Transform, model: nn.Module, routes: Sequence[Route], half_precision: str = "master", alignment: int = 1
) -> tuple[Layout, Transform]:
    """The banks of `model`, whose matrices keep their order in memory where `transform` allows it, and the transform
    that knows them. `alignment`: parameters begin at multiples of so many entries of a flat bank at least."""
    drawn = alignment_of(half_precision, [p.dtype for p in model.parameters()])
    alignment = max(transform.extras.alignment, drawn, alignment)
    layout = build_layout(model, routes, columns_in_memory_order=True, alignment=alignment)
    whole = bound(transform, layout.infos)
    if _knows_columns(whole, layout):
        layout = build_layout(model, routes, alignment=alignment)
        whole = bound(transform, layout.infos)
    return layout, whole


def _knows_columns(transform: Transform, layout: Layout) -> bool:
    """Whether the state of `transform` has something for each column of a matrix whose columns lie in another order (a
    right factor, a basis, a sample): it would mean other columns in a model whose weights lie in order."""
    ordered = {b.key: b.shape for b in layout.banks if b.matrix is not None and any(p.order for p in b.places)}
    if not ordered:
        return False
    try:
        state = dict(flat_tree.flatten(transform.init(layout.without_data()), keys.OPTIMIZER))
    except Exception:  # of any kind: a transform that needs values cannot tell
        return True
    for path, tensor in state.items():
        key = layout.bank_of(path)
        if key in ordered and tuple(tensor.shape) != ordered[key] and tensor.ndim > 1 and tensor.shape[-1] > 1:
            return True
    return False
