"""Whether an optimizer's update of one parameter can be computed without the others, and of one entry without the rest.

Ranks that own different parameters compute their updates apart from each other. An update that needs all of them must
not be computed from those that one rank happens to have.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fusion_compile._state import flat_tree
from fusion_compile._step.pooled import reason_to_wait, train_banks, two_parameters
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import ELEMENTWISE, BankInfo, Place, Transform, bound

_ROWS, _COLUMNS = 32, 16


def refuse_inseparable(transform: Transform) -> None:
    """Raise ValueError with the reason if `transform` needs parameters that other ranks own."""
    asked, remedy = "parameters on several ranks (DTensor, fully_shard)", "Take another recipe."
    reason = reason_to_wait(transform, asked, remedy) or _reason_to_be_together(transform)
    if reason:
        raise ValueError(
            f"{transform.name} cannot update parameters that lie on several ranks (DTensor, fully_shard), because "
            f"{reason} needs all parameters, and each rank has some of them. Take a recipe whose parameters are "
            f"updated apart from each other (adamw, lion, adakaon, muon, normuon, sf_normuon, …), or parameters that "
            f"are whole on every rank (DistributedDataParallel)."
        )


def is_entry_by_entry(transform: Transform) -> bool:
    """Whether elementwise parameters may be cut anywhere: the parts' updates are those of the whole, bit by bit, and
    all that is kept has an entry for each of theirs, or is a number that all share."""
    if ELEMENTWISE not in (transform.roles or (ELEMENTWISE,)):
        return True
    try:
        return all(_parts_are_alike(transform, shape) for shape in ((_ROWS, _COLUMNS), (_ROWS * _COLUMNS,)))
    except Exception:  # of any kind: a transform that cannot be tried is updated whole
        return False


def _reason_to_be_together(transform: Transform) -> str:
    """What an update needs of other parameters besides their gradients: their names, their number."""
    with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        infos, banks = two_parameters(transform)
        gradients = [{key: torch.randn_like(bank) for key, bank in banks.items()} for _ in range(2)]
        together = train_banks(bound(transform, infos), banks, gradients)
        alone_infos = {key: _second_alone(info) for key, info in infos.items()}
        alone = train_banks(
            bound(transform, alone_infos),
            {key: _second(bank) for key, bank in banks.items()},
            [{key: _second(g) for key, g in given.items()} for given in gradients],
        )
    # Products of one matrix and of two may run in other kernels: their last bits are no reason.
    same = all(torch.allclose(_second(together[k]), alone[k], rtol=1e-4, atol=1e-6) for k in banks)
    return "" if same else "the update of one parameter, which changes with which others there are,"


def _second(bank: Tensor) -> Tensor:
    return bank[bank.shape[0] // 2 :]


def _second_alone(info: BankInfo) -> BankInfo:
    return info._replace(places=(info.places[1]._replace(at=0),))


def _parts_are_alike(transform: Transform, shape: tuple[int, ...]) -> bool:
    half, key = (shape[0] // 2, *shape[1:]), f"{ELEMENTWISE}/float32"
    entries = shape[0] * (shape[1] if len(shape) > 1 else 1)
    with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        weights = torch.randn(entries)
        gradients = [torch.randn(entries) * 10.0**i for i in (0, -4, 1)]
        whole = _trained_alone(transform, key, shape, weights, gradients)
        parts = [
            _trained_alone(transform, key, half, *_cut(weights, gradients, slice(begin, begin + entries // 2)))
            for begin in (0, entries // 2)
        ]
        kept = _kept(transform, key, shape, weights)
    return torch.equal(whole, torch.cat(parts)) and all(t.ndim == 0 or tuple(t.shape) == (entries,) for t in kept)


def _cut(weights: Tensor, gradients: list[Tensor], part: slice) -> tuple[Tensor, list[Tensor]]:
    return weights[part].clone(), [g[part].clone() for g in gradients]


def _trained_alone(
    transform: Transform, key: str, shape: tuple[int, ...], weights: Tensor, gradients: list[Tensor]
) -> Tensor:
    info = {key: BankInfo((Place("layers.0.weight", shape, 0),))}
    given: list[Tensors] = [{key: g} for g in gradients]
    return train_banks(bound(transform, info), {key: weights}, given)[key]


def _kept(transform: Transform, key: str, shape: tuple[int, ...], weights: Tensor) -> list[Tensor]:
    info = {key: BankInfo((Place("layers.0.weight", shape, 0),))}
    state = bound(transform, info).init({key: weights})
    return [tensor for _, tensor in flat_tree.flatten(state)]
