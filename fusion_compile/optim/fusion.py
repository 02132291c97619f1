"""`fusion` and `full_fusion`: any subset of FusionOpt's components, each with its paper's equation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fusion_compile.optim._combine import chain, partition
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import ELEMENTWISE, SPECTRAL, Named, Transform, pair_of
from fusion_compile.optim.add_decayed_weights import add_decayed_weights
from fusion_compile.optim.autoscale import autoscale
from fusion_compile.optim.cautious import cautious
from fusion_compile.optim.hyperball import hyperball
from fusion_compile.optim.measured import measured
from fusion_compile.optim.normalize_neurons import normalize_neurons
from fusion_compile.optim.orthogonalize import orthogonalize
from fusion_compile.optim.scale_by_adam import scale_by_adam
from fusion_compile.optim.scale_by_kl_shampoo import scale_by_kl_shampoo
from fusion_compile.optim.scale_by_layer import scale_by_layer
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.scale_by_momentum import scale_by_momentum
from fusion_compile.optim.scale_by_mona import scale_by_mona
from fusion_compile.optim.scale_by_rms import scale_by_rms
from fusion_compile.optim.scale_by_shampoo import scale_by_shampoo
from fusion_compile.optim.scale_by_shape import scale_by_shape
from fusion_compile.optim.scale_lr_by_loss_ratio import scale_lr_by_loss_ratio
from fusion_compile.optim.schedule_free import schedule_free
from fusion_compile.optim.schedule_free_plus import schedule_free_plus
from fusion_compile.optim.snr_gate import snr_gate

COMPONENTS: dict[str, str] = {
    "ns5": "orthogonalization by five Newton-Schulz iterations (Muon)",
    "normuon": "NorMuon's row-wise second moment, rescaled to a root mean square of 0.2",
    "sf": "Schedule-Free averaging of everything",
    "mona": "MONA's gradient, half itself and half a slow average",
    "shampoo": "KL-Shampoo before the orthogonalization (FusionOpt's label for it)",
    "plain_shampoo": "Shampoo with inverse fourth roots, before the orthogonalization",
    "cautious": "only entries that agree with the gradient's sign move",
    "snr": "rows gated by their gradient's signal-to-noise ratio",
    "autoscale": "D-Adaptation's multiplier of lr, with bounded growth",
    "hyperball": "matrices stay on the sphere of their first norm; lr is an angle",
}
"""What each component is here, by FusionOpt's names (`plain_shampoo` and `hyperball` are ours)."""

ALIASES = {"kl_shampoo": "shampoo"}
STEP_SIZES = (None, "loss_ratio", "polyak")


def fusion(
    components: Iterable[str] = ("ns5", "normuon", "sf"),
    lr: float | Schedule | None = None,
    *,
    momentum: float | None = None,
    nesterov: bool | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.05,
    mona_beta: float = 0.99,
    mona_alpha: float | None = None,
    shampoo_beta: float = 0.98,
    every: int = 10,
    scalar_betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    step_size: str | None = None,
    layer_weights: Mapping[int, float] | None = None,
    coefficients: str = "jordan",
    matmul_dtype: torch.dtype | str = "auto",
    gram_restarts: tuple[int, ...] | str | None = "auto",
    audit_every: int = 0,
) -> Transform:
    """FusionOpt's components by its names, each with its paper's equation, composed in FusionOpt's order.

    On matrices: ``mona`` → momentum → ``shampoo`` or ``plain_shampoo`` → ``ns5`` → ``normuon`` → ``snr`` → ``cautious``
    → layer weights → decay → step; on the rest AdamW (under ``sf`` its second moment alone), ``cautious`` → decay →
    step; around both ``sf`` and the step size. `COMPONENTS` lists what can be combined.

    Memory: 4 bytes a parameter for momentum, plus per component: ``sf`` 4, ``mona`` 4, ``snr`` 4, ``shampoo`` 8
    (m/n + n/m), ``autoscale`` a fraction.
    Source: the papers of the components; FusionOpt for names and order. Deviations from FusionOpt are the point
    (`fusionopt_compat` follows it instead): docs/porting.md lists them.

    Args:
        components: Names from `COMPONENTS`.
        lr: In AdamW's unit with ``normuon`` or ``ns5`` (a matrix update has root mean square 0.2 lr); without both the
            momentum moves in the gradient's unit; under ``hyperball`` the angle of a step; with ``"polyak"`` a factor
            on the step size that it finds. None: 8e-3, with ``"polyak"`` 1.
        momentum: None: 0.8 under ``sf`` (SF-NorMuon's), else 0.95.
        nesterov: None: off under ``sf``, else on.
        betas: Schedule-Free's β, live as ``schedule_free_beta``, and β₂ of ``normuon``, live as ``neuron_beta2``.
        weight_decay: Per unit of lr, on all parameters.
        mona_beta: See `scale_by_mona`.
        mona_alpha: See `scale_by_mona`.
        shampoo_beta: See `scale_by_kl_shampoo`.
        every: Updates between two refreshes of Shampoo's bases.
        scalar_betas: Adam's, for the rest. Live as ``beta1`` and ``scalar_beta2``.
        eps: Of Adam (live as ``scalar_eps``) and of ``normuon``.
        step_size: None, ``"loss_ratio"`` (FusionOpt's γ: `scale_lr_by_loss_ratio`) or ``"polyak"`` (Schedule-Free+,
            needs ``sf``).
        layer_weights: See `scale_by_layer`.
        coefficients: See `orthogonalize`.
        matmul_dtype: See `orthogonalize`.
        gram_restarts: See `orthogonalize`.
        audit_every: See `orthogonalize`.

    Returns:
        A complete optimizer for the roles ``"spectral"`` and ``"scalar"``.

    Raises:
        ValueError: A component or option is not known, or the combination cannot work; the message has the reason.
        TypeError: `components` is a string; `betas` is not a pair.

    Example:
        >>> from fusion_compile import optim
        >>> optim.fusion({"ns5", "normuon", "sf", "cautious"}, optim.constant(8e-3, 100)).name
        'fusion(ns5, normuon, sf, cautious)'
    """
    on = _check(components, step_size)
    if lr is None:
        lr = 1.0 if step_size == "polyak" else 8e-3
    free, (beta, beta2) = "sf" in on, pair_of(betas)
    mu, ahead = (0.8 if free else 0.95) if momentum is None else momentum, (not free) if nesterov is None else nesterov

    gradient: list[Transform] = [scale_by_mona(mona_beta, mona_alpha)] if "mona" in on else []
    direction = chain(*gradient, measured(scale_by_momentum(mu, nesterov=ahead), "comp/momentum_norm", "norm"))
    if "shampoo" in on:
        direction = scale_by_kl_shampoo(shampoo_beta=shampoo_beta, base=direction, every=every)
    if "plain_shampoo" in on:
        direction = scale_by_shampoo(shampoo_beta=shampoo_beta, base=direction, every=every)
    if "ns5" in on:
        polar = orthogonalize(
            None,
            coefficients=coefficients,
            matmul_dtype=matmul_dtype,
            gram_restarts=gram_restarts,
            audit_every=audit_every,
        )
        direction = chain(direction, measured(polar, "comp/ns5_gain"))
    if "normuon" in on:
        rows = normalize_neurons(Named("neuron_beta2", beta2), scale="match_rms", eps=eps)
        direction = chain(direction, measured(rows, "comp/normuon_gain"))
    elif "ns5" in on:
        direction = chain(direction, scale_by_shape("match_rms_adamw"))
    if "snr" in on:
        direction = snr_gate(direction)
    if "cautious" in on:
        # Behind an orthogonalization half the signs disagree, and "mean" would add 40 % to the norm.
        direction = cautious(direction, rescale="norm")
    spectral = [measured(direction, "comp/spectral_update_norm", "norm")]
    if layer_weights:
        spectral.append(scale_by_layer(layer_weights))
    if "hyperball" in on:
        spectral.append(hyperball(lr))
    else:
        spectral += [add_decayed_weights(weight_decay), scale_by_learning_rate(lr)]

    scalar_beta1, scalar_beta2 = pair_of(scalar_betas, "scalar_betas")
    b1, b2, e = Named("beta1", scalar_beta1), Named("scalar_beta2", scalar_beta2), Named("scalar_eps", eps)
    adam = scale_by_rms(b2, e) if free else scale_by_adam((b1, b2), e)
    scalar = chain(
        cautious(adam) if "cautious" in on else adam,
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
    # If both parts report a diagnostic of one name, the matrices' value wins: the last part's does.
    whole = partition({ELEMENTWISE: scalar, SPECTRAL: chain(*spectral, name="fusion")}, name="fusion")
    if free:
        if step_size == "polyak":
            whole = schedule_free_plus(whole, lr, beta, weight_decay=Named("polyak_weight_decay", 0.0))
        else:
            whole = schedule_free(whole, lr, beta)
    if step_size == "loss_ratio":
        whole = scale_lr_by_loss_ratio(whole)
    if "autoscale" in on:
        whole = autoscale(whole)
    return whole.with_extras(name=f"fusion({', '.join(name for name in COMPONENTS if name in on) or 'momentum'})")


def full_fusion(lr: float | Schedule = 8e-3, **options: Any) -> Transform:
    """``fusion({"ns5", "normuon", "sf", "mona", "shampoo"})``, FusionOpt's full set.

    MONA's gradient, momentum, KL-Shampoo, orthogonalization, neuron-wise normalization, Schedule-Free. Memory: 12 bytes
    a parameter, and 8 (m/n + n/m) for the factors.

    Args:
        lr: AdamW's unit.
        **options: Those of `fusion`.

    Returns:
        A complete optimizer.

    Raises:
        ValueError: See `fusion`.

    Example:
        >>> from fusion_compile import optim
        >>> optim.full_fusion(4e-3).hyperparameters["lr"]
        0.004
    """
    return fusion(("ns5", "normuon", "sf", "mona", "shampoo"), lr, **options).with_extras(name="full_fusion")


def _check(components: Iterable[str], step_size: str | None) -> frozenset[str]:
    """The components by their own names. ValueError with the reason for what cannot be combined."""
    if isinstance(components, str):
        raise TypeError(f"components={components!r} is a string; give a set of names, {{{components!r}}}.")
    on = frozenset(ALIASES.get(name, name) for name in components)
    if unknown := sorted(on - COMPONENTS.keys()):
        raise ValueError(f"unknown component {unknown[0]!r}; fusion() knows {', '.join(COMPONENTS)}.")
    if step_size not in STEP_SIZES:
        raise ValueError(f"step_size={step_size!r} is not known; use one of {', '.join(map(repr, STEP_SIZES))}.")
    if {"shampoo", "plain_shampoo"} <= on:
        raise ValueError("'shampoo' and 'plain_shampoo' precondition the same momentum; keep one of them.")
    for name in ("shampoo", "plain_shampoo"):
        if name in on and not on & {"ns5", "normuon", "hyperball"}:
            raise ValueError(
                f"{name!r} alone diverges: nothing bounds the size of the preconditioned update. Add an orthogonalizer "
                f"('ns5'), or what grafts a norm onto it ('normuon', 'hyperball')."
            )
    if {"sf", "hyperball"} <= on:
        raise ValueError("'hyperball' keeps weights on a sphere, which the average of 'sf' leaves; keep one of them.")
    if step_size == "loss_ratio" and "hyperball" in on:
        raise ValueError(
            "under 'hyperball' lr is an angle, and step_size='loss_ratio' makes it up to ten times larger; drop one."
        )
    if step_size == "polyak" and "sf" not in on:
        raise ValueError("step_size='polyak' is Schedule-Free+'s and needs 'sf'; add it, or use 'loss_ratio'.")
    return on
