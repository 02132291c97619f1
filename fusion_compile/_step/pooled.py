"""Whether an optimizer's update of one parameter needs the gradients of others, so that it cannot be taken at once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import ELEMENTWISE, BankInfo, Context, Place, Transform, bound

_SIDE, _UPDATES = 16, 3


def refuse_pooled(transform: Transform) -> None:
    """Raise ValueError with the reason if `transform` cannot update a parameter before all gradients are there."""
    if reason := reason_to_wait(transform, "release_gradients=True", "Leave release_gradients out."):
        raise ValueError(
            f"release_gradients=True: {transform.name} cannot update a parameter as soon as its gradient arrives, "
            f"because {reason} is known only after the whole backward. Leave release_gradients out, or take a recipe "
            f"whose parameters are updated apart from each other (adamw, lion, adakaon, muon, …)."
        )


def reason_to_wait(transform: Transform, asked: str, remedy: str) -> str:
    """What an update of one parameter needs of all others, as the subject of a sentence; empty where it needs nothing.

    What a part declares (``Extras.pools``) counts. Three updates of two small parameters of each role, with other
    gradients for the first, show what a part does not declare. ValueError where they cannot be tried, which says what
    was `asked` for and the `remedy`.
    """
    if transform.extras.pools:
        return transform.extras.pools
    try:
        return "" if _is_apart(transform) else "the update of one parameter, which changes with others' gradients,"
    except Exception as error:  # of any kind: a transform of somebody else's fails in its own way
        raise ValueError(
            f"{asked}: {transform.name} could not be tried on two parameters ({error}), so nothing tells whether an "
            f"update needs all gradients. {remedy}"
        ) from error


def _is_apart(transform: Transform) -> bool:
    """Whether the second parameter of each bank is the same whatever gradients the first has."""
    with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        infos, banks = two_parameters(transform)
        whole = bound(transform, infos)
        gradients = [{key: torch.randn_like(bank) for key, bank in banks.items()} for _ in range(_UPDATES)]
        others = [{key: _first_replaced(g) for key, g in given.items()} for given in gradients]
        one, other = train_banks(whole, banks, gradients), train_banks(whole, banks, others)
    return all(torch.equal(_second(one[key]), _second(other[key])) for key in banks)


def two_parameters(transform: Transform) -> tuple[dict[str, BankInfo], Tensors]:
    """Two small parameters of each role of `transform`: what it may know of their banks, and the banks."""
    infos = {key: _two_parameters(key, transform) for key in _keys(transform)}
    return infos, {key: torch.randn(_shape(key, infos[key])) for key in infos}


def train_banks(transform: Transform, banks: Tensors, gradients: list[Tensors]) -> Tensors:
    """The banks after an update with each of `gradients`. `transform` knows its banks."""
    state, params = transform.init(banks), dict(banks)
    numbers = {n: v(1) if callable(v) else v for n, v in transform.hyperparameters.items()}
    context = Context({n: torch.tensor(float(v)) for n, v in numbers.items()}, due=transform.period > 0)
    for given in gradients:
        updates, state = transform.update(given, state, params, context)
        params = {key: p + updates[key] for key, p in params.items()}
    return params


def _keys(transform: Transform) -> list[str]:
    roles = transform.roles or (ELEMENTWISE,)
    return [f"{role}/float32" if role == ELEMENTWISE else f"{role}/{_SIDE}x{_SIDE}/float32" for role in roles]


def _two_parameters(key: str, transform: Transform) -> BankInfo:
    if not key.startswith(ELEMENTWISE):
        return BankInfo((Place("layers.0.weight", (_SIDE, _SIDE), 0), Place("layers.1.weight", (_SIDE, _SIDE), 1)))
    entries = max(_SIDE, transform.extras.alignment)
    return BankInfo((Place("layers.0.bias", (entries,), 0), Place("layers.1.bias", (entries,), entries)))


def _shape(key: str, info: BankInfo) -> tuple[int, ...]:
    if key.startswith(ELEMENTWISE):
        return (2 * info.places[0].numel,)
    return (2, _SIDE, _SIDE)


def _first_replaced(gradient: Tensor) -> Tensor:
    half = gradient.shape[0] // 2
    return torch.cat([100 * torch.randn_like(gradient[:half]), gradient[half:]])


def _second(bank: Tensor) -> Tensor:
    return bank[bank.shape[0] // 2 :]
