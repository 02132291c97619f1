"""Which parameter takes which path through the optimizer, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fusion_compile.optim._grouped import DEFAULT
from fusion_compile.optim._transform import ELEMENTWISE, MATRIX, SPECTRAL, Blocks

SPECTRAL_MIN_SIDE = 128
"""Matrices with a shorter side are updated element by element: Newton-Schulz gains nothing there."""
ELEMENTWISE_RECIPE = "the recipe is elementwise"
"""The reason of every route of an optimizer without a spectral part."""

_HEAD_NAME = re.compile(
    r"(^|\.)(lm_head|head|heads|classifier|unembed|to_logits|fc_out|proj_out|final_layer\.linear|final_layer)\.weight$"
)
_EXPERTS = re.compile(r"(^|[._])experts?([._]|$)", re.IGNORECASE)
"""Mixtures of experts keep the matrices of all experts in one parameter ``[E, m, n]``."""
_KERNEL = 32
"""Last axes up to which a parameter ``[o, i, h, w, …]`` of any module is taken for a convolution's weight."""
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Route:
    """One parameter's role (``"spectral"`` or ``"scalar"``) and the reason in words.

    `blocks`: how its matrix is cut for the update; None updates it whole. `group`: the group whose numbers it
    follows. `stack`: whether the parameter is a stack of matrices ``[…, m, n]``, each updated by itself.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str
    blocks: Blocks | None = None
    group: str = DEFAULT
    stack: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a convolution has its first axis as rows and flattens the rest, a stack has those of each
        of its matrices."""
        return self.shape[-2:] if self.stack else (self.shape[0], math.prod(self.shape[1:]))  # type: ignore[return-value]


def _matching(patterns: Sequence[str], name: str) -> str | None:
    return next((p for p in patterns if re.search(p, name)), None)


def check_list(option: str, patterns: object) -> None:
    """TypeError unless `patterns` is a list or tuple."""
    if isinstance(patterns, str):
        raise TypeError(f"{option}={patterns!r} is a string; give a list of regular expressions, [{patterns!r}].")
    if not isinstance(patterns, Sequence):
        raise TypeError(f"{option} is a {type(patterns).__name__}; give a list of regular expressions.")


def check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a string instead of a list, an invalid regular expression, and a pattern that matches none of `names`."""
    check_list(option, patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{option}: {pattern!r} is not a regular expression ({error}); escape a name with re.escape(name)."
            ) from None
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
    max_aspect: float = math.inf,
) -> tuple[Route, ...]:
    """A `Route` for every trainable parameter of `model`, in the order of ``named_parameters()``.

    Spectral: linear and (flattened) convolution weights with both sides at least 128 that are neither embedding nor
    output head, and the stacked matrices ``[E, m, n]`` of experts. A parameter of three or more axes that is named in
    `force_spectral` is a stack, however short its last axis, unless it belongs to a convolution (a module of torch's
    or one whose class says so), or has four axes or more and the last ones of a kernel. `roles`: those that the
    optimizer handles; without a spectral role every parameter is ``"scalar"``, or ``"matrix"`` if the optimizer has
    that role and the parameter two axes or more. `force_scalar`, `force_spectral`: regular expressions searched in the
    full name; both at once is a ValueError. `max_aspect`: no matrix that is more than so many times as long as wide is
    spectral, unless it is forced.
    """
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    names = [n for n, _ in trainable]
    check_patterns("force_scalar", force_scalar, names)
    check_patterns("force_spectral", force_spectral, names)
    if force_spectral and SPECTRAL not in roles:
        raise ValueError(
            f"force_spectral={list(force_spectral)} has no effect: the optimizer updates every parameter element by "
            f"element; drop it, or use one with a spectral part (muon, normuon, sf_normuon)."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {
        f"{prefix}.{key}" if prefix else key: module
        for prefix, module in modules.items()
        for key, _ in module._parameters.items()  # which those of torch.jit have, and no iteration over keys
    }

    def user_of(name: str) -> nn.Module | None:
        """The module that uses a parameter: of a parametrized one not its collection of originals."""
        head, parametrized, _ = name.partition(".parametrizations.")
        return modules.get(head) if parametrized else owners.get(name)

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    head = _output_head(model)
    # By identity: named_parameters() lists a tied parameter under the first of its names only.
    heads = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name == head or (_HEAD_NAME.search(name) and not re.search(r"\.\d+\.", name))
    }

    def decide(name: str, p: nn.Parameter) -> _Decision:
        if SPECTRAL not in roles:
            return _Decision(ELEMENTWISE, ELEMENTWISE_RECIPE)
        off, on = _matching(force_scalar, name), _matching(force_spectral, name)
        if off and on:
            raise ValueError(f"{name} matches both force_scalar ({off!r}) and force_spectral ({on!r}); keep one.")
        if off:
            return _Decision(ELEMENTWISE, f"force_scalar {off!r}")
        if p.ndim < 2 or p.numel() == 0:
            if on:
                raise ValueError(f"force_spectral {on!r}: {name} of shape {tuple(p.shape)} is not a matrix.")
            return _Decision(ELEMENTWISE, f"{p.ndim}-D" if p.numel() else "empty")
        is_conv = isinstance(owners.get(name), _CONV)
        experts = p.ndim > 2 and _EXPERTS.search(name) is not None
        is_stack = p.ndim > 2 and not is_conv and (experts or not _is_kernel(p, user_of(name)))
        if on:
            how = f"; {_stacked(p)}" if is_stack else "; flattened, as a convolution's weight is" if p.ndim > 2 else ""
            return _Decision(SPECTRAL, f"force_spectral {on!r}{how}", is_stack)
        if id(p) in embeddings:
            return _Decision(ELEMENTWISE, "embedding")
        if id(p) in heads:
            return _Decision(ELEMENTWISE, "output head")
        if p.ndim > 2 and not is_conv and not experts:
            return _Decision(ELEMENTWISE, f"{p.ndim}-D and not a convolution")
        rows, columns = p.shape[-2:] if is_stack else (p.shape[0], p.numel() // p.shape[0])
        if min(rows, columns) < SPECTRAL_MIN_SIDE:
            return _Decision(ELEMENTWISE, f"a side under {SPECTRAL_MIN_SIDE}")
        if max(rows, columns) > max_aspect * min(rows, columns):
            return _Decision(ELEMENTWISE, f"more than {max_aspect:g} times as long as wide")
        if is_stack:
            return _Decision(SPECTRAL, _stacked(p), True)
        return _Decision(SPECTRAL, f"{rows}×{columns} matrix" + (" (flattened convolution)" if is_conv else ""))

    def route_of(name: str, p: nn.Parameter) -> Route:
        role, reason, stack = decide(name, p)
        if role == ELEMENTWISE and MATRIX in roles and p.ndim > 1 and p.numel() and not _matching(force_scalar, name):
            is_stack = p.ndim > 2 and not isinstance(owners.get(name), _CONV) and not _is_kernel(p, user_of(name))
            role, reason, stack = MATRIX, _stacked(p) if is_stack else f"{p.ndim}-D, rows by the first axis", is_stack
        elif MATRIX in roles and reason == ELEMENTWISE_RECIPE:
            reason = f"{p.ndim}-D" if p.numel() else "empty"
        return Route(name, tuple(p.shape), role, reason, stack=stack)

    return tuple(route_of(n, p) for n, p in trainable)


class _Decision(NamedTuple):
    role: str
    reason: str
    stack: bool = False


def _is_kernel(p: nn.Parameter, owner: nn.Module | None) -> bool:
    """Whether a parameter of `owner`, which is none of torch's convolutions, is a convolution's weight all the same.

    The owner's class says so (``CausalConv1d``, a parametrized one), or its last axes are as short as a kernel's.

    Three axes alone say nothing: ``[heads, m, 4]`` is a stack of low ranks as well as a kernel.
    """
    named = owner is not None and "conv" in type(owner).__name__.lower()
    return named or (p.ndim > 3 and max(p.shape[2:]) <= _KERNEL)


def _stacked(p: nn.Parameter) -> str:
    rows, columns = p.shape[-2:]
    return f"a stack of {p.numel() // (rows * columns)} matrices of {rows}×{columns}"


def refuse_roles(routes: Sequence[Route], roles: Sequence[str], optimizer: str) -> None:
    """Raise ValueError for a route whose role `optimizer`, which handles `roles`, does not have."""
    if stray := next((r.name for r in routes if r.role not in roles), None):
        raise ValueError(
            f"{optimizer} handles only {', '.join(roles)} parameters, but {stray} is not one; give the rest a "
            f"transform of their own: optim.partition({{'spectral': …, 'scalar': …}})."
        )
