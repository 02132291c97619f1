"""Whether an update is the same, bit by bit, when a flat bank is updated piece by piece.

Then a large gradient can be read where the backward left it, and need not lie in a bank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from fusion_compile._state import flat_tree
from fusion_compile._state.routing import Route
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import ELEMENTWISE, BankInfo, BankInfos, Context, Place, Transform, bound

COLUMNS = 16
"""A piece is a tensor ``[rows, 16]``: of any length, and yet a multiple of what a processor computes at once."""
_ROWS, _KEY = 32, f"{ELEMENTWISE}/float32"
_SCALES = (1.0, 1e-4, 10.0)


def is_piecewise(transform: Transform, routes: Iterable[Route]) -> bool:
    """Whether the parameters of `routes` may be updated piece by piece.

    Three updates of a bank of two parameters are compared with those of its halves: the weights, all that is kept of
    each entry, the numbers that all share, and the point at which gradients are taken. What measures, works every so
    many steps or lets a block of entries share a number needs the banks whole.
    """
    extras = transform.extras
    whole = extras.diagnostics or extras.periodic or extras.period or extras.pools or extras.alignment > 1
    if whole or ELEMENTWISE not in (transform.roles or (ELEMENTWISE,)) or any(r.role != ELEMENTWISE for r in routes):
        return False
    try:
        with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return _pieces_are_alike(transform)
    except Exception:  # of any kind: a transform that cannot be tried is updated whole
        return False


def _pieces_are_alike(transform: Transform) -> bool:
    half = _ROWS * COLUMNS
    weights = torch.randn(2 * half)
    gradients = [torch.randn(2 * half) * scale for scale in _SCALES]
    places = (Place("layers.0.weight", (_ROWS, COLUMNS), 0), Place("layers.1.bias", (half,), half))
    whole = _walk(transform, {_KEY: BankInfo(places)}, weights, gradients)
    for begin in (0, half):
        info = BankInfo((Place("x", (half,), 0),), names=torch.zeros(1, dtype=torch.int64))
        cut = [t[begin : begin + half].clone().view(-1, COLUMNS) for t in (weights, *gradients)]
        piece = _walk(transform, {_KEY: info}, cut[0], cut[1:])
        if len(piece) != len(whole) or not all(_is_piece(p, w, begin) for p, w in zip(piece, whole, strict=True)):
            return False
    return True


def _is_piece(piece: Tensor, whole: Tensor, begin: int) -> bool:
    if not whole.ndim or not piece.ndim:
        return torch.equal(piece, whole)
    entries = _ROWS * COLUMNS
    if whole.shape != (2 * entries,) or piece.shape != (_ROWS, COLUMNS):
        return False
    return torch.equal(piece.flatten(), whole[begin : begin + entries])


def _walk(transform: Transform, infos: BankInfos, weights: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Everything that there is after each of the updates, in one order."""
    transform = bound(transform, infos)
    params: Tensors = {_KEY: weights}
    state = transform.init(params)
    numbers = {n: v(1) if callable(v) else v for n, v in transform.hyperparameters.items()}
    context = Context({n: torch.tensor(float(v)) for n, v in numbers.items()})
    seen = [t for _, t in flat_tree.flatten(state)]
    for gradient in gradients:
        updates, state = transform.update({_KEY: gradient}, state, params, context)
        params = {_KEY: params[_KEY] + updates[_KEY]}
        seen += [params[_KEY], *(t for _, t in flat_tree.flatten(state))]
        if transform.gradient_point is not None:
            seen.append(transform.gradient_point(params, state, context)[_KEY])
    return seen
