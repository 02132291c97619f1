"""The trajectory of FusionOpt (Taikakim/fusion-optimiser), including its departures from the papers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from fusion_compile.optim._fusionopt.banked_parameters import BankedParameters
from fusion_compile.optim._fusionopt.spectral import HOT_DTYPES, SpectralDirection
from fusion_compile.optim._fusionopt.step_size import Autoscale, Shape
from fusion_compile.optim._fusionopt.update import FusionOpt
from fusion_compile.optim._ranges import refuse_given
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    SPECTRAL,
    BankInfos,
    Extras,
    Number,
    Transform,
    by_name,
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
"""Live numbers that exist only with a component."""


def fusionopt_compat(
    components: Collection[str] | None = None,
    lr: Number = 3e-4,
    *,
    scalar_lr: Number | None = None,
    beta: Number = 0.9,
    beta_p: Number = 0.98,
    gamma_min: Number = 0.1,
    gamma_max: Number = 10.0,
    gamma_scale: Number = 1.0,
    mu: Number = 0.95,
    mona_alpha: Number = 0.2,
    beta_n: Number = 0.9,
    beta_k: Number = 0.99,
    eigen_period: int = 100,
    shampoo_delta: Number = 1e-4,
    beta_r: Number = 0.95,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.01,
    scalar_weight_decay: Number = 0.0,
    warmup_steps: int = 0,
    decay_schedule: str | None = None,
    total_steps: int | None = None,
    decay_min: float = 0.0,
    decay_start_frac: float = 0.8,
    snr_mode: str = "row",
    snr_source: str = "grad",
    snr_beta: Number = 0.9,
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
    """FusionOpt's trajectory, for a run that must be continued or compared.

    For a new run take `sf_normuon`, or a recipe of the published parts. A step, with ratio ρ = clamp(EMA loss /
    EMA mean|g|, γ_min, γ_max) and autoscale's multiplier A::

        γ = lr · ρ · A · warm-up · decay · gamma_scale
        matrices: Shampoo factors, MONA, momentum m ← μ m + g, P_L m P_R, Newton-Schulz, rows, SNR gate, cautious -> U
        the rest: Adam, cautious -> U
        sf:  z ← (1 - γ·wd) z - γ U;  x ← (1 - 1/t) x + z / t;  the gradient is taken at y = (1 - β) z + β x
        hyperball:  p ← R W / ‖W‖, W = p - γ R U / ‖U‖        else:  p ← (1 - γ·wd) p - γ U

    The loss arrives through the step; without one, ρ is 1. Memory, bytes a parameter: matrices 4, "sf" 4, "mona" 8,
    "snr" 4 (8 by element), "autoscale" 0.5, "shampoo" 8 (r² + c²) a matrix; the rest 8, "sf" 4, "autoscale" 8.

    Kept from FusionOpt, against the papers: the cast to the hot dtype before the norm, whose 1e-12 is zero in fp16 (a
    zero matrix gives nan there); row *sums* without bias correction or rescaling in NorMuon (a first update 4.47 times
    too large); MONA without (1 - β) and with α = +0.2; plain Shampoo under KL-Shampoo's name, with an absolute ridge;
    mean |g| under the loss, so that ρ is nearly always γ_max; an average by 1/t whatever the lr; a distance d from
    updates that are not gradients, which multiplied the step by 2,300 at the second update of a small quadratic.

    Source: Taikakim/fusion-optimiser, dbb5246. Deviations: the module holds x, while FusionOpt's holds y until
    ``eval()``. Parameters below fp32 have an fp32 master; FusionOpt without "sf" rounds the weights every step. A
    parameter without a gradient counts as one with gradient zero. Shampoo's root is a matrix iteration in fp64 with a
    ridge of at least 2^-22 ‖M‖, below which FusionOpt's eigenvalues are rounding noise; its refresh follows the step's
    own count, which skipped steps advance. d stays fp32 and on the device. Everything is saved with the state, so a
    resumed run continues unchanged. Routing is the step's: FusionOpt also sends embeddings and heads with both sides at
    least 128 the spectral way (name them in ``force_spectral``) and no convolution (``force_scalar``).

    Args:
        components: Any of ``COMPONENTS``; None for **all** of them, as in FusionOpt.
        lr: The movement of one entry for a direction of size 1 before ρ. ρ in practice sits at γ_max, so ten times lr.
        scalar_lr: FusionOpt's per-group lr; None: `lr`.
        beta: Schedule-Free's β.
        beta_p: Decay of the averages in ρ.
        gamma_min: γ_min.
        gamma_max: γ_max.
        gamma_scale: Factor on γ.
        mu: Decay μ of the momentum.
        mona_alpha: α of MONA.
        beta_n: Decay of MONA's curvature.
        beta_k: Decay of Shampoo's factors.
        eigen_period: Steps between two refreshes of Shampoo's roots.
        shampoo_delta: Absolute ridge of Shampoo's roots.
        beta_r: Decay of NorMuon's row sums.
        betas: FusionOpt's beta1 and beta2, of Adam.
        eps: Adam's.
        weight_decay: FusionOpt's spectral_wd, per unit of γ.
        scalar_weight_decay: FusionOpt's scalar_wd, per unit of γ.
        warmup_steps: Steps of linear warm-up.
        decay_schedule: ``"cosine"``, ``"linear"``, ``"wsd"``, or None.
        total_steps: Length of the run; needed by `decay_schedule`.
        decay_min: Factor at the end of the decay.
        decay_start_frac: Share of the run before the decay, for ``"wsd"``.
        snr_mode: ``"row"`` or ``"elem"``.
        snr_source: ``"grad"`` or ``"update"``.
        snr_beta: Decay of the gate's averages.
        snr_floor: Smallest gain.
        snr_power: Exponent of the gain.
        autoscale_d0: First distance.
        autoscale_coef: Factor on the estimated distance.
        autoscale_growth_rate: Largest growth of the distance in one step.
        autoscale_slice_p: Sample every so many entries.
        autoscale_beta3: Decay of the sums; None: √0.999.
        layer_update_weights: Multiplier by the number in ``layers.N.`` of a matrix's name.
        hyperball: Keep matrices on the sphere of their first norm.
        hot_dtype: Of Newton-Schulz: "fp32", "bf16", "fp16", "fp16_safe" or a dtype.
        telemetry: Measure the ``comp/`` norms and gains: some reductions over the matrices in each step.

    Returns:
        A complete optimizer for the roles ``"spectral"`` and ``"scalar"``.

    Raises:
        ValueError: An option is not one of the above, or two of them exclude each other.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.fusionopt_compat({"ns5", "normuon", "sf"}, lr=3e-4, hot_dtype="bf16")
        >>> optimizer.descends
        True
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

    refuse_given("snr_floor", snr_floor, "snr_floor")
    refuse_given("snr_power", snr_power, "snr_power")
    values: dict[str, Number] = {
        "lr": lr,
        "beta_p": beta_p,
        "gamma_min": gamma_min,
        "gamma_max": gamma_max,
        "gamma_scale": gamma_scale,
        "mu": mu,
        "weight_decay": weight_decay,
        "scalar_weight_decay": scalar_weight_decay,
    }
    of_components: dict[str, Number] = {
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
    adam = scale_by_adam(betas, eps)
    hyperparameters = merge_hyperparameters(by_name(*named.values()), adam.hyperparameters)
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

    def build(infos: BankInfos | None) -> Transform:
        parameters = BankedParameters(infos, layer_update_weights)
        beta3 = math.sqrt(0.999) if autoscale_beta3 is None else autoscale_beta3
        autoscale = None
        if "autoscale" in chosen:
            autoscale = Autoscale(
                parameters, autoscale_d0, autoscale_coef, autoscale_growth_rate, autoscale_slice_p, beta3
            )
        blocks = {k: info.blocks for k, info in (infos or {}).items() if info.blocks is not None}
        made = FusionOpt(chosen, hyperball, named, shape, direction, adam, autoscale, parameters, blocks)
        extras = Extras(
            "fusionopt_compat",
            hyperparameters,
            (SPECTRAL, ELEMENTWISE),
            made.gradient_point if "sf" in chosen else None,
            made.diagnostics,
            period=eigen_period if "shampoo" in chosen else 0,
            bind=build,
            descends=True,
            pools="γ, from the loss and the mean of all gradients,",
        )
        return Transform(made.init, made.update, extras)

    return build(None)
