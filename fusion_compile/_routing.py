"""Which parameter takes which path through the optimizer, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

SPECTRAL_MIN_SIDE = 128
"""Matrices with a shorter side are updated element by element: Newton-Schulz gains nothing there."""

_HEAD_NAME = re.compile(
    r"(^|\.)(lm_head|head|heads|classifier|unembed|to_logits|fc_out|proj_out|final_layer\.linear|final_layer)\.weight$"
)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Route:
    """One parameter's role (``"spectral"`` or ``"scalar"``) and the reason in words."""

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str


def _matching(patterns: Sequence[str], name: str) -> str | None:
    return next((p for p in patterns if re.search(p, name)), None)


def _check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    if isinstance(patterns, str):
        raise TypeError(f"{option}={patterns!r} is a string; give a list of regular expressions, [{patterns!r}].")
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"{option}: {pattern!r} matches no trainable parameter; the names look like {', '.join(names[:3])}."
            )


def _output_head(model: nn.Module) -> str | None:
    """Name of the last linear or convolution, when it is the model's last child itself (``nn.Sequential(...,
    Linear)``)."""
    module, prefix = model, ""
    while True:
        children = list(module.named_children())
        if not children:
            break
        if isinstance(module, nn.ModuleList):
            return None
        last_name, module = children[-1]
        prefix = f"{prefix}{last_name}."
        if not isinstance(module, (nn.Sequential, nn.Linear, *_CONV)):
            return None
    if isinstance(module, (nn.Linear, *_CONV)):
        return f"{prefix}weight"
    return None


def route(
    model: nn.Module,
    roles: Sequence[str],
    force_scalar: Sequence[str] = (),
    force_spectral: Sequence[str] = (),
) -> tuple[Route, ...]:
    """A `Route` for every trainable parameter of `model`, in the order of ``named_parameters()``.

    Spectral: linear and (flattened) convolution weights with both sides at least 128 that are neither embedding nor
    output head. `roles` are those the optimizer handles; with no spectral role every parameter is ``"scalar"``.
    `force_scalar`, `force_spectral`: regular expressions searched in the full name; both at once is a ValueError.
    """
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    names = [n for n, _ in trainable]
    _check_patterns("force_scalar", force_scalar, names)
    _check_patterns("force_spectral", force_spectral, names)
    if force_spectral and "spectral" not in roles:
        raise ValueError(
            f"force_spectral={list(force_spectral)} has no effect: the optimizer updates every parameter element by "
            f"element; drop it, or use one with a spectral part (muon, normuon, sf_normuon)."
        )
    owners = {
        f"{prefix}.{key}" if prefix else key: module
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key in module._parameters
    }
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    head = _output_head(model)
    # By identity, because a tied parameter goes by the first of its names.
    heads = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name == head or (_HEAD_NAME.search(name) and not re.search(r"\.\d+\.", name))
    }

    def decide(name: str, p: nn.Parameter) -> tuple[str, str]:
        if "spectral" not in roles:
            return "scalar", "the recipe is elementwise"
        off, on = _matching(force_scalar, name), _matching(force_spectral, name)
        if off and on:
            raise ValueError(f"{name} matches both force_scalar ({off!r}) and force_spectral ({on!r}); keep one.")
        if off:
            return "scalar", f"force_scalar {off!r}"
        if p.ndim < 2 or p.numel() == 0:
            if on:
                raise ValueError(f"force_spectral {on!r}: {name} of shape {tuple(p.shape)} is not a matrix.")
            return "scalar", f"{p.ndim}-D" if p.numel() else "empty"
        if on:
            return "spectral", f"force_spectral {on!r}"
        if id(p) in embeddings:
            return "scalar", "embedding"
        if id(p) in heads:
            return "scalar", "output head"
        is_conv = isinstance(owners.get(name), _CONV)
        if p.ndim > 2 and not is_conv:
            return "scalar", f"{p.ndim}-D and not a convolution"
        rows, columns = p.shape[0], p.numel() // p.shape[0]
        if min(rows, columns) < SPECTRAL_MIN_SIDE:
            return "scalar", f"a side under {SPECTRAL_MIN_SIDE}"
        return "spectral", f"{rows}×{columns} matrix" + (" (flattened convolution)" if is_conv else "")

    return tuple(Route(n, tuple(p.shape), *decide(n, p)) for n, p in trainable)
