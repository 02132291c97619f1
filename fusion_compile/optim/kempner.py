"""KempnerForge's classes under their own names: change ``from kempnerforge.training.optimizer import Muon`` to this.

Keywords, their order and their defaults are the source's. Each is a recipe of this package, whose docstring has the
equation and all deviations. ``p.grad`` is never changed, and ``zero_grad`` clears the gradients of every parameter (of
the source's Muon it forgets those of its AdamW, which then grow for the whole run). Each class takes this package's
``model``, ``mode`` and ``backend`` besides; see `as_torch_optimizer`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile.optim._schedules import constant
from fusion_compile.optim.kempner_recipes import kempner_muon, kempner_sf_adamw
from fusion_compile.optim.recipes import adamw, lion
from fusion_compile.torch_optimizer import Parameters, TorchOptimizer

_RELEASE = "release_gradients"
NAMES = ("adamw", "lion", "muon", "schedule_free_adamw")
_CONFIG: dict[str, Any] = {
    "name": "adamw",
    "lr": 3e-4,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "fused": True,
    "muon_momentum": 0.95,
    "muon_ns_steps": 5,
    "muon_adam_lr": None,
    "schedule_free_warmup_steps": 0,
}
"""Fields of the source's configuration, with its defaults."""


class Lion(TorchOptimizer):
    """Lion; see `lion`.

    Args:
        params: Parameters, groups, or the model.
        lr: Every entry moves by it.
        betas: β₁ of the step and β₂ of the momentum.
        weight_decay: Per unit of lr.
        **own: ``model``, ``mode``, ``backend``.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kempner import Lion
        >>> Lion(torch.nn.Linear(4, 2).parameters(), lr=1e-4).defaults["beta2"]
        0.99
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **own: Any,
    ) -> None:
        made = functools.partial(lion, lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(params, made, **_rest(Lion, own))
        self._release_gradients(bool(own.get(_RELEASE)))


class ScheduleFreeAdamW(TorchOptimizer):
    """Schedule-Free AdamW whose average weighs each step by lr; see `kempner_sf_adamw`.

    While training the parameters hold the gradient point, as in the source; a checkpoint has both.

    Args:
        params: Parameters, groups, or the model.
        lr: Size of a step of one entry of z.
        betas: β of the gradient point, and β₂.
        eps: Added to the root of the second moment.
        weight_decay: Per unit of lr, at z.
        warmup_steps: Of a linear warm-up.
        **own: ``model``, ``mode``, ``backend``.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kempner import ScheduleFreeAdamW
        >>> optimizer = ScheduleFreeAdamW(torch.nn.Linear(4, 2).parameters(), lr=0.025, warmup_steps=100)
        >>> optimizer.eval_params()  # before an evaluation
        >>> optimizer.train_params()
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        **own: Any,
    ) -> None:
        rate = constant(lr, warmup_steps=warmup_steps) if warmup_steps > 0 else lr
        made = functools.partial(kempner_sf_adamw, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, made, **_rest(ScheduleFreeAdamW, own))
        self._release_gradients(bool(own.get(_RELEASE)))

    def eval_params(self) -> None:
        """Put the average into the parameters; ``eval()`` in this package's words."""
        self.eval()

    def train_params(self) -> None:
        """Put the gradient point into the parameters; ``train()`` in this package's words."""
        self.train()


class Muon(TorchOptimizer):
    """Muon without Nesterov on the first parameters, AdamW on the second; see `kempner_muon`.

    Deviation: AdamW's rate is lr times a fixed factor, so it follows whoever writes lr in any group.

    Args:
        muon_params: Groups of matrices; whatever their size, they are orthogonalized.
        adam_params: Groups of the rest. A group without ``weight_decay`` has 0.01, torch's default for AdamW.
        lr: Spectral norm a step, times √max(1, r/c).
        momentum: Decay of the average.
        weight_decay: Of matrices, per unit of lr.
        adam_betas: Of AdamW.
        adam_eps: Of AdamW.
        ns_steps: Newton-Schulz iterations, 1 to 5.
        adam_lr: AdamW's lr; None is `lr`.
        **own: ``model``, ``mode``, ``backend``.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kempner import Muon
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = Muon([{"params": [model.weight]}], [{"params": [model.bias], "weight_decay": 0.0}], lr=0.02)
        >>> len(optimizer.param_groups)
        2
    """

    def __init__(
        self,
        muon_params: Iterable[Any],
        adam_params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        ns_steps: int = 5,
        adam_lr: float | None = None,
        **own: Any,
    ) -> None:
        matrices = _groups(muon_params, {"weight_decay": weight_decay})
        rest = _groups(adam_params, {"weight_decay": 0.01})
        if adam_lr is not None and not lr > 0:
            raise ValueError(f"adam_lr={adam_lr!r} is a share of lr={lr!r}, which must be above 0.")
        made = functools.partial(
            kempner_muon,
            lr=lr,
            momentum_decay=momentum,
            weight_decay=weight_decay,
            adam_ratio=1.0 if adam_lr is None else adam_lr / lr,
            adam_betas=adam_betas,
            adam_eps=adam_eps,
            ns_steps=ns_steps,
            matmul_dtype=torch.float32,
            max_aspect=float("inf"),
        )
        options = _rest(Muon, own)
        model = options.get("model")
        options["force_spectral"] = _patterns(matrices, 0, model)
        options["force_scalar"] = _patterns(rest, len(matrices), model)
        super().__init__([*matrices, *rest], made, **options)
        self._release_gradients(bool(own.get(_RELEASE)))


def build_optimizer(model: nn.Module, config: Any) -> TorchOptimizer:
    """KempnerForge's optimizer for `model`: matrices decay, what has one axis or "bias" in its name does not.

    ``"adamw"``, ``"lion"``, ``"schedule_free_adamw"``, or ``"muon"``: Muon on matrices at most ten times as long as
    wide, AdamW on the rest.

    Args:
        model: Its trainable parameters are optimized.
        config: A dictionary, dataclass or object with the source's fields: ``name``, ``lr``, ``weight_decay``,
            ``betas``, ``eps``, ``fused`` (says nothing here), ``muon_momentum``, ``muon_ns_steps``, ``muon_adam_lr``,
            ``schedule_free_warmup_steps``. What it lacks has the source's default.

    Returns:
        The optimizer. Nothing is compiled before its first step.

    Raises:
        ValueError: The name or a field is not known; a number is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kempner import build_optimizer
        >>> optimizer = build_optimizer(torch.nn.Linear(4, 2), {"name": "lion", "lr": 1e-4})
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """
    c = _fields(config)
    decays: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decays if p.ndim > 1 and "bias" not in name else others).append((name, p))
    groups = [{"params": decays, "weight_decay": c["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    numbers = {"lr": c["lr"], "betas": tuple(c["betas"])}
    if c["name"] == "lion":
        return Lion(groups, **numbers, model=model)
    if c["name"] == "schedule_free_adamw":
        warmup = int(c["schedule_free_warmup_steps"])
        return ScheduleFreeAdamW(groups, **numbers, eps=c["eps"], warmup_steps=warmup, model=model)
    if c["name"] == "adamw":
        made = functools.partial(adamw, **numbers, eps=c["eps"])
        return TorchOptimizer(groups, made, **_rest(TorchOptimizer, {"model": model}))
    return Muon(
        _where(groups, True),
        _where(groups, False),
        lr=c["lr"],
        momentum=c["muon_momentum"],
        weight_decay=c["weight_decay"],
        adam_betas=numbers["betas"],
        adam_eps=c["eps"],
        ns_steps=c["muon_ns_steps"],
        adam_lr=c["muon_adam_lr"],
        model=model,
    )


def _fields(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        given = dict(config)
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    else:
        given = {name: getattr(config, name) for name in _CONFIG if hasattr(config, name)}
    if unknown := next((name for name in given if name not in _CONFIG), None):
        raise ValueError(f"build_optimizer(): the field {unknown!r} is not known; there are {', '.join(_CONFIG)}.")
    fields = {**_CONFIG, **given}
    if fields["name"] not in NAMES:
        raise ValueError(f"build_optimizer(): {fields['name']!r} is not an optimizer; use one of {', '.join(NAMES)}.")
    return fields


def _where(groups: Iterable[Mapping[str, Any]], eligible: bool) -> list[dict[str, Any]]:
    """`groups` with those parameters alone that Muon takes, or does not take."""
    halves = [{**group, "params": [e for e in group["params"] if _is_eligible(e[1]) is eligible]} for group in groups]
    return [group for group in halves if group["params"]]


def _is_eligible(p: Tensor) -> bool:
    if p.ndim < 2:
        return False
    rows, columns = p.shape[0], p.numel() // max(p.shape[0], 1)
    return max(rows, columns) <= 10 * max(min(rows, columns), 1)


def _groups(given: Iterable[Any], numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = list(given)
    groups = entries if any(isinstance(e, dict) for e in entries) else [{"params": entries}]
    whole = [{**numbers, **group} for group in groups]
    for group in whole:
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    return [group for group in whole if group["params"]]


def _patterns(groups: Sequence[Mapping[str, Any]], first: int, model: nn.Module | None) -> tuple[str, ...]:
    """Regular expressions for exactly the parameters of `groups`, of which the first has this index."""
    known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    found: list[str] = []
    for at, group in enumerate(groups, first):
        for i, entry in enumerate(group["params"]):
            name = entry[0] if isinstance(entry, tuple) else known.get(id(entry))
            found.append(re.escape(name or f"param_groups[{at}]['params'][{i}]"))
    return tuple(f"^{name}$" for name in found)


def _rest(kind: type, own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `TorchOptimizer` that a class leaves to this package's own keywords."""
    words = ("model", "mode", "backend", _RELEASE)
    if unknown := next((name for name in own if name not in words), None):
        raise TypeError(f"{kind.__name__} has no keyword {unknown!r}; beside the source's it has {', '.join(words)}.")
    rest: dict[str, Any] = {"lr": None, "mode": None, "backend": "inductor", "force_scalar": (), "force_spectral": ()}
    return {**rest, **{name: value for name, value in own.items() if name != _RELEASE}}
