"""Batches: their validation, their signature, and their split into micro-batches."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fusion_compile._compat import is_of_a_trace
from fusion_compile._step.arrays import holds_numpy, why_not, without_numpy
from fusion_compile._step.containers import leaves as leaves
from fusion_compile._step.containers import leaves_without_rings, map_tensors, special_containers

Signature: TypeAlias = tuple[tuple[str, Any], ...]
"""``(path, (shape, dtype, stride, the path of the same tensor before it or None))`` of every tensor, ``(path, int)`` or
``(path, float)`` of every number, and ``(path, value)`` of every constant: None, a bool, a string, a member of an
enumeration."""
NUMBERS = (int, float)
"""Types of numbers whose value may be another one in each batch."""
_TENSORS = {Tensor}
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_CONSTANTS = (type(None), bool, str, enum.Enum, torch.dtype, torch.device, torch.Size)


def are_tensors(batch: tuple[Any, ...]) -> bool:
    """Whether a batch is plain tensors alone, in no container."""
    return {*map(type, batch)} == _TENSORS


def tensors(batch: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of a batch, in the order of `leaves`."""
    if are_tensors(batch):
        return list(batch)
    return [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor)]


def with_leaves(batch: Any, given: Iterable[Tensor]) -> Any:
    """`batch` with the tensors of `given`, in the order of `leaves`, in the places of its own; containers are new."""
    following = iter(given)
    return map_tensors(lambda _: next(following), batch)


def clone(tensor: Tensor) -> Tensor:
    """A copy of a batch's tensor in memory of its own, with the class and the attributes of the user's."""
    copied = tensor.detach().clone()
    if type(copied) is not type(tensor) and type(copied) is Tensor:
        copied = copied.as_subclass(type(tensor))
    if vars(tensor) and type(tensor) is not Tensor:
        vars(copied).update(vars(tensor))
    return copied


def refuse_special(batch: tuple[Any, ...]) -> None:
    """Raise TypeError for a tensor that no program takes: of a class of its own, sparse, nested, quantized."""
    for path, leaf in leaves(batch):
        if not isinstance(leaf, Tensor) or is_of_a_trace(leaf):
            continue
        kind, advice = type(leaf).__name__, "make it from plain tensors in the loss"
        if type(leaf) in _PLAIN and leaf.layout is torch.strided and not leaf.is_nested and not leaf.is_quantized:
            continue
        if type(leaf) not in _PLAIN:
            advice = f"give tensor.as_subclass(torch.Tensor), or {advice}"
        elif leaf.is_nested or leaf.is_quantized:
            kind = "nested tensor" if leaf.is_nested else f"{leaf.dtype} tensor"
        else:
            kind = f"{leaf.layout} tensor"
        raise TypeError(
            f"{path} is a {kind}, and a program takes plain dense tensors; {advice}. mode='eager' takes it as it is."
        )


def numbers(batch: tuple[Any, ...]) -> dict[str, Any]:
    """The Python numbers of a batch by path, in the order of `leaves`."""
    return {path: leaf for path, leaf in leaves(batch) if type(leaf) in NUMBERS}


def signature(batch: tuple[Any, ...], device: torch.device, *, fixed: bool = False) -> Signature:
    """The key of the program that fits `batch`. ValueError or TypeError for a batch that no program can take.

    `fixed`: a number counts as a constant, so that each value has a program.
    """
    places: dict[int, str] = {}  # one tensor in two places is one input of a program
    out: list[tuple[str, Any]] = [(path, f"a {kind.__qualname__}") for path, kind in special_containers(batch)]
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.device != device:
                raise ValueError(
                    f"{path} {list(leaf.shape)} is on {leaf.device}, but the model is on {device}. "
                    f"Move it before the step: tensor.to({str(device)!r})."
                )
            if leaf.requires_grad:
                raise ValueError(
                    f"{path} {list(leaf.shape)} requires a gradient, but the step differentiates the model's "
                    f"parameters only; pass tensor.detach()."
                )
            first = places.setdefault(id(leaf), path)
            out.append((path, (tuple(leaf.shape), leaf.dtype, leaf.stride(), None if first == path else first)))
        elif type(leaf) in NUMBERS:
            out.append((path, repr(leaf) if fixed else type(leaf)))
        elif isinstance(leaf, _CONSTANTS):
            out.append((path, leaf))
        else:
            raise TypeError(_sentence(path, leaf, device))
    return tuple(out)


def _sentence(path: str, leaf: Any, device: torch.device) -> str:
    """Why a batch cannot hold `leaf`, and what can."""
    kind = type(leaf).__name__
    if isinstance(leaf, np.ndarray):
        return f"{path} is a numpy array {leaf.dtype} {list(leaf.shape)}, {why_not(leaf)}."
    if isinstance(leaf, torch.Generator):
        return (
            f"{path} is a torch.Generator, whose state is no part of a batch; let the loss close over it (a default "
            f"argument, an attribute), and its state goes on from step to step."
        )
    shown = repr(leaf)
    if len(shown) > 60:
        return (
            f"{path} is a {kind}, which a program cannot take; give tensors in tuples, lists, dictionaries or "
            f"dataclasses."
        )
    return (
        f"{path} is a {kind} ({shown}), which a program cannot take; give tensors, numbers, None, booleans, strings or "
        f"members of an enumeration."
    )


def check_same_kind(signature: Signature, compiled: Iterable[Signature]) -> None:
    """Raise ValueError if a batch has tensors of other dtypes than those that programs were `compiled` for. It may have
    other parts (a mask in some batches, a list of images that is longer)."""
    for first in compiled:
        old = _kinds(first)
        for path, kind in _kinds(signature).items():
            if kind and old.get(path) and kind != old[path]:
                raise ValueError(
                    f"{path} is {kind}, but the step was compiled for {old[path]}; convert it, or compile another step."
                )
        return


def _kinds(signature: Signature) -> dict[str, str]:
    """The dtype of each tensor by path; "" for what is no tensor."""
    return {path: str(what[1]) if type(what) is tuple else "" for path, what in signature}


def taken(batch: tuple[Any, ...], device: torch.device) -> tuple[tuple[Any, ...], bool]:
    """`batch` as a step takes it, and whether it held arrays of numpy, which are tensors on `device` now. Tensors that
    were made in inference mode (a cache of latents), which autograd refuses, are clones."""
    found = leaves_without_rings(batch)
    if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in found):
        batch = map_tensors(lambda t: t.clone() if t.is_inference() else t, batch)
    numpys = holds_numpy(found)
    return without_numpy(batch, device) if numpys else batch, numpys
