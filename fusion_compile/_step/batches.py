"""Batches: their validation, their signature, and their split into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusion_compile._step.containers import children, map_tensors, special_containers

Signature: TypeAlias = tuple[tuple[str, Any], ...]
"""``(path, (shape, dtype, stride, the path of the same tensor before it or None))`` of every tensor, and ``(path,
value)`` of every None, bool or string."""


def leaves(tree: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """``(path, leaf)`` of nested tuples, lists, dictionaries and dataclasses."""
    inner = children(tree)
    if inner is None:
        yield path, tree
    else:
        for step, child in inner:
            yield from leaves(child, path + step)


def tensors(batch: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of a batch, in the order of `leaves`."""
    return [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor)]


def with_leaves(batch: Any, given: Iterable[Tensor]) -> Any:
    """`batch` with the tensors of `given`, in the order of `leaves`, in the places of its own; containers are new."""
    following = iter(given)
    return map_tensors(lambda _: next(following), batch)


def signature(batch: tuple[Any, ...], device: torch.device) -> Signature:
    """The key of the program that fits `batch`. ValueError or TypeError for a batch that no program can take."""
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
        elif leaf is None or isinstance(leaf, bool | str):
            out.append((path, leaf))
        else:
            raise TypeError(_sentence(path, leaf, device))
    return tuple(out)


def _sentence(path: str, leaf: Any, device: torch.device) -> str:
    """Why a batch cannot hold `leaf`, and what can."""
    kind = type(leaf).__name__
    if type(leaf).__module__ == "numpy" and hasattr(leaf, "__array_interface__"):
        shape = list(getattr(leaf, "shape", ()))
        return f"{path} is a numpy {kind} {leaf.dtype} {shape}; give torch.as_tensor({path}, device={str(device)!r})."
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
        f"{path} is a {kind} ({shown}); every new value would need another program. "
        f"Pass a tensor, torch.tensor({shown}, device={str(device)!r})."
    )


def check_same_kind(signature: Signature, compiled: Iterable[Signature]) -> None:
    """Raise ValueError if a batch differs in more than its shapes from those that programs were `compiled` for."""
    for first in compiled:
        new, old = _kinds(signature), _kinds(first)
        if new.keys() != old.keys():
            odd = sorted(new.keys() ^ old.keys())[0]
            how = "has no" if odd in old else "has an additional"
            raise ValueError(
                f"the batch {how} {odd}, unlike the first one; give the same parts, or compile another step."
            )
        for path, kind in new.items():
            if kind != old[path]:
                raise ValueError(
                    f"{path} is {kind}, but the step was compiled for {old[path]}; convert it, or compile another step."
                )
        return


def _kinds(signature: Signature) -> dict[str, str]:
    return {path: str(what[1]) if isinstance(what, tuple) else repr(what) for path, what in signature}


def outside_inference(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """`batch` with clones of tensors that were made in inference mode (a cache of latents), which autograd refuses."""
    if not any(tensor.is_inference() for tensor in tensors(batch)):
        return batch
    cloned: tuple[Any, ...] = map_tensors(lambda t: t.clone() if t.is_inference() else t, batch)
    return cloned
