"""FusionOpt as it is: the trajectory of Taikakim/fusion-optimiser, its departures from the papers included."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from fusion_compile.optim._fusionopt.members import Members
from fusion_compile.optim._fusionopt.spectral import HOT_DTYPES, SpectralDirection
from fusion_compile.optim._fusionopt.step_size import Autoscale, Shape
from fusion_compile.optim._fusionopt.update import FusionOpt
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    SPECTRAL,
    Facts,
    Scalar,
    Transform,
    declare,
    merge_hyperparameters,
)
from fusion_compile.optim.scale_by_adam import scale_by_adam

COMPONENTS = ("mona", "shampoo", "ns5", "normuon", "sf", "cautious", "snr", "autoscale")

_NUMBERS_OF = {
    "mona": ("mona_alpha", "beta_n"),
    "shampoo": ("beta_k", "shampoo_delta"),
    "normuon": ("beta_r",),
    "sf": ("beta",),
    "snr": ("snr_beta",),
}
"""The live numbers that exist only with a component."""


def fusionopt_compat(
    components: Collection[str] | None = None,
    lr: Scalar = 3e-4,
    *,
    scalar_lr: Scalar | None = None,
    beta: Scalar = 0.9,
    beta_p: Scalar = 0.98,
    gamma_min: Scalar = 0.1,
    gamma_max: Scalar = 10.0,
    gamma_scale: Scalar = 1.0,
    mu: Scalar = 0.95,
    mona_alpha: Scalar = 0.2,
    beta_n: Scalar = 0.9,
    beta_k: Scalar = 0.99,
    eigen_period: int = 100,
    shampoo_delta: Scalar = 1e-4,
    beta_r: Scalar = 0.95,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.01,
    scalar_weight_decay: Scalar = 0.0,
    warmup_steps: int = 0,
    decay_schedule: str | None = None,
    total_steps: int | None = None,
    decay_min: float = 0.0,
    decay_start_frac: float = 0.8,
    snr_mode: str = "row",
    snr_source: str = "grad",
    snr_beta: Scalar = 0.9,
    snr_floor: float = 0.0,
    snr_power: float = 1.0,
    autoscale_d0: float = 1e-6,
    autoscale_coef: float = 1.0,
    autoscale_growth_rate: float = math.inf,
    autoscale_slice_p: int = 16,
    autoscale_beta3: float | None = None,
    layer_update_weights: Mapping[int, float] | None = None,
    hyperball: bool = False,
    hot_dtype: str | torch.dtype = "fp32",
    telemetry: bool = True,
) -> Transform:
    """FusionOpt's trajectory, for a run that must be continued or compared; for a new one take `sf_normuon` or a recipe
    of the published parts.

    A step, with ratio ρ = clamp(EMA loss / EMA mean|g|, γ_min, γ_max) and autoscale's multiplier A::

        γ = lr · ρ · A · warm-up · decay · gamma_scale
        matrices: Shampoo factors, MONA, momentum m ← μ m + g, P_L m P_R, Newton-Schulz, rows, SNR gate, cautious -> U
        the rest: Adam, cautious -> U
        sf:  z ← (1 - γ·wd) z - γ U;  x ← (1 - 1/t) x + z / t;  the gradient is taken at y = (1 - β) z + β x
        hyperball:  p ← R W / ‖W‖, W = p - γ R U / ‖U‖        else:  p ← (1 - γ·wd) p - γ U

    lr: what one entry moves for a direction of size 1 before ρ, which in practice sits at γ_max, so ten times lr. All
    options bear FusionOpt's names; `components`: any of ``COMPONENTS``, None for **all** of them, as there. `betas`
    are its beta1, beta2; `weight_decay`, `scalar_weight_decay` its spectral_wd, scalar_wd; `scalar_lr` its per-group
    lr (None: lr). `hot_dtype`: "fp32", "bf16", "fp16", "fp16_safe" or a dtype. `layer_update_weights`: multiplier by
    the number in ``layers.N.`` of a matrix's name. `telemetry`: measure the ``comp/`` norms and gains, some reductions
    over the matrices a step. The loss arrives through the step; where there is none, ρ is 1.

    Kept from FusionOpt, and not what the papers say: the cast to the hot dtype before the norm, whose 1e-12 is zero in
    fp16 (a zero matrix gives nan there); row *sums* without bias correction or rescaling in NorMuon (a first update
    4.47 times too large); MONA without (1 - β) and with α = +0.2; plain Shampoo under KL-Shampoo's name, with an
    absolute ridge; mean |g| under the loss, so that ρ is nearly always γ_max; an average by 1/t whatever the lr; a
    distance d from updates that are not gradients, which multiplied the step by 2,300 at the second update of a small
    quadratic.

    Memory, bytes a parameter: matrices 4, "sf" 4, "mona" 8, "snr" 4 (8 by element), "autoscale" 0.5, "shampoo"
    8 (r² + c²) a matrix; the rest 8, "sf" 4, "autoscale" 8. Source: Taikakim/fusion-optimiser, dbb5246.

    Deviations: the module holds x, where FusionOpt's holds y until ``eval()``. Parameters below fp32 have an fp32
    master, where FusionOpt without "sf" rounds the weights every step. A parameter without a gradient counts as one
    with gradient zero. Shampoo's root is a matrix iteration in fp64 with a ridge of at least 2^-22 ‖M‖, below which
    FusionOpt's eigenvalues are rounding noise; its refresh follows the step's own count, which skipped steps advance.
    d stays fp32 and on the device. Everything is saved with the state, so a resumed run goes on as it was. Routing is
    the step's: FusionOpt also sends embeddings and heads with both sides at least 128 the spectral way (name them in
    ``force_spectral``) and no convolution (``force_scalar``).
    """
    chosen = frozenset(COMPONENTS if components is None else components)
    if unknown := chosen - set(COMPONENTS):
        raise ValueError(f"components {sorted(unknown)} are not known; use some of {', '.join(map(repr, COMPONENTS))}.")
    if hyperball and "sf" in chosen:
        raise ValueError(
            "hyperball=True and the component 'sf' both decide where the weights go; leave 'sf' out: "
            f"components={sorted(chosen - {'sf'})}."
        )
    if isinstance(hot_dtype, str) and hot_dtype not in HOT_DTYPES:
        raise ValueError(f"hot_dtype={hot_dtype!r} is not known; use one of {', '.join(map(repr, HOT_DTYPES))}.")
    if isinstance(hot_dtype, torch.dtype) and not hot_dtype.is_floating_point:
        raise ValueError(f"hot_dtype={hot_dtype} cannot run Newton-Schulz; use a floating-point dtype.")
    for option, value, known in (
        ("snr_mode", snr_mode, ("row", "elem")),
        ("snr_source", snr_source, ("grad", "update")),
    ):
        if value not in known:
            raise ValueError(f"{option}={value!r} is not known; use {known[0]!r} or {known[1]!r}.")
    if eigen_period < 1 or autoscale_slice_p < 1:
        raise ValueError(
            f"eigen_period={eigen_period} and autoscale_slice_p={autoscale_slice_p} are counts; give at least 1."
        )

    values: dict[str, Scalar] = {
        "lr": lr,
        "beta_p": beta_p,
        "gamma_min": gamma_min,
        "gamma_max": gamma_max,
        "gamma_scale": gamma_scale,
        "mu": mu,
        "weight_decay": weight_decay,
        "scalar_weight_decay": scalar_weight_decay,
    }
    of_components: dict[str, Scalar] = {
        "beta": beta,
        "mona_alpha": mona_alpha,
        "beta_n": beta_n,
        "beta_k": beta_k,
        "shampoo_delta": shampoo_delta,
        "beta_r": beta_r,
        "snr_beta": snr_beta,
    }
    values |= {name: of_components[name] for part in sorted(chosen & set(_NUMBERS_OF)) for name in _NUMBERS_OF[part]}
    named = {name: declare(name, value) for name, value in values.items()}
    named["scalar_lr"] = named["lr"] if scalar_lr is None else declare("scalar_lr", scalar_lr)
    adam = scale_by_adam(*betas, eps)
    hyperparameters = merge_hyperparameters({n.name: n.value for n in named.values()}, adam.hyperparameters)
    shape = Shape(
        warmup_steps, None if decay_schedule == "none" else decay_schedule, total_steps, decay_min, decay_start_frac
    )
    direction = SpectralDirection(
        chosen,
        HOT_DTYPES[hot_dtype] if isinstance(hot_dtype, str) else hot_dtype,
        hot_dtype == "fp16_safe",
        snr_mode,
        snr_source,
        snr_floor,
        snr_power,
        telemetry,
    )

    def build(facts: Facts | None) -> Transform:
        members = Members(facts, layer_update_weights)
        beta3 = math.sqrt(0.999) if autoscale_beta3 is None else autoscale_beta3
        autoscale = None
        if "autoscale" in chosen:
            autoscale = Autoscale(
                members, autoscale_d0, autoscale_coef, autoscale_growth_rate, autoscale_slice_p, beta3
            )
        blocks = {k: f.blocks for k, f in (facts or {}).items() if f.blocks is not None}
        made = FusionOpt(chosen, hyperball, named, shape, direction, adam, autoscale, members, blocks)
        return Transform(
            made.init,
            made.update,
            hyperparameters,
            (SPECTRAL, ELEMENTWISE),
            made.gradient_point if "sf" in chosen else None,
            "fusionopt_compat",
            made.diagnostics,
            period=eigen_period if "shampoo" in chosen else 0,
            bind=build,
        )

    return build(None)
