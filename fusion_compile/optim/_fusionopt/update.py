"""One step of FusionOpt: its step size, its directions and its averaging.

It sees all banks at once instead of using `partition`, because its ratio of loss to gradient and its autoscale pool all
parameters. `fusionopt_compat` builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import part_of
from fusion_compile.optim._fusionopt.banked_parameters import BankedParameters, is_stacked
from fusion_compile.optim._fusionopt.spectral import (
    SpectralDirection,
    SpectralState,
    mean_over_matrices,
    sum_of_squares,
)
from fusion_compile.optim._fusionopt.step_size import Autoscale, AutoscaleState, PolyakState, Shape, polyak_ratio
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    SPECTRAL,
    Blocks,
    Context,
    Named,
    Transform,
)
from fusion_compile.optim._tree import copy, count_like, lerp, number_like
from fusion_compile.optim.scale_by_adam import ScaleByAdamState

OF_COMPONENT = {
    "mona": "mona_curvature_norm",
    "shampoo": "shampoo_gain",
    "ns5": "ns5_gain",
    "normuon": "normuon_gain",
    "snr": "snr_gain",
    "cautious": "cautious_keep_frac",
}
"""What is measured for a component on matrices, in FusionOpt's words."""


class FusionOptState(NamedTuple):
    """`step_count`: 0-dim. `z`: Schedule-Free's fast weights; `radius`: Hyperball's norms, ``[..., 1, 1]``. These two
    and `autoscale` are empty if not in use; `spectral` and `scalar` if no parameter has that role. `measured`: 0-dim,
    see `FusionOpt.diagnostics`."""

    step_count: Tensor
    polyak: PolyakState
    autoscale: AutoscaleState | tuple[()]
    spectral: SpectralState | tuple[()]
    scalar: ScaleByAdamState | tuple[()]
    z: Tensors
    radius: Tensors
    measured: dict[str, Tensor]


@dataclass(frozen=True)
class FusionOpt:
    """The functions of the transform. `named`: the live numbers by FusionOpt's names; `adam`: for the scalar role;
    `blocks`: how matrices are cut, by bank."""

    components: frozenset[str]
    hyperball: bool
    named: Mapping[str, Named]
    shape: Shape
    direction: SpectralDirection
    adam: Transform
    autoscale: Autoscale | None
    parameters: BankedParameters
    blocks: Mapping[str, Blocks]

    def init(self, params: Tensors) -> FusionOptState:
        matrices, rest = part_of(params, SPECTRAL), part_of(params, ELEMENTWISE)
        for key in params:
            if key not in matrices and key not in rest:
                raise ValueError(
                    f"bank {key!r} has a role that fusionopt_compat() does not have; use spectral, scalar."
                )
        self.parameters.make_tables(params)
        return FusionOptState(
            count_like(params),
            PolyakState(number_like(params, 0.0), number_like(params, 0.0)),
            () if self.autoscale is None else self.autoscale.init(params),
            self.direction.init(matrices) if matrices else (),
            self.adam.init(rest) if rest else (),
            copy(params) if "sf" in self.components else {},
            {k: self.norms(k, p) for k, p in matrices.items()} if self.hyperball else {},
            {name: number_like(params, 0.0) for name in self.measured(bool(matrices), bool(rest))},
        )

    def measured(self, matrices: bool, rest: bool) -> tuple[str, ...]:
        """Names of what `update` measures, in FusionOpt's words."""
        names = ["gamma_curr", "gamma_t", "decay"]
        names += ["autoscale_mult"] if self.autoscale is not None else []
        if matrices and self.direction.telemetry:
            names += ["momentum_norm", "spectral_update_norm"]
            names += [name for part, name in OF_COMPONENT.items() if part in self.components]
        names += ["scalar_grad_norm"] if rest and self.direction.telemetry else []
        return tuple(names)

    def gradient_point(self, params: Tensors, state: FusionOptState, context: Context) -> Tensors:
        return lerp(state.z, params, context.hyperparameters[self.named["beta"].name])

    def update(
        self, grads: Tensors, state: FusionOptState, params: Tensors, context: Context
    ) -> tuple[Tensors, FusionOptState]:
        number = {name: context.hyperparameters[named.name] for name, named in self.named.items()}
        matrices, rest = part_of(grads, SPECTRAL), part_of(grads, ELEMENTWISE)
        clamp = (number["beta_p"], number["gamma_min"], number["gamma_max"])
        ratio, polyak = polyak_ratio(grads, state.polyak, self.parameters, context.loss, state.step_count == 0, clamp)
        decay = self.shape.decayed(state.step_count).to(ratio.dtype)
        factor = ratio * self.shape.warm(state.step_count).to(ratio.dtype) * decay * number["gamma_scale"]
        measured = {"gamma_curr": ratio, "decay": decay}
        scaled = state.autoscale
        if self.autoscale is not None and isinstance(scaled, AutoscaleState):
            live = self.gradient_point(params, state, context) if "sf" in self.components else params
            measured["autoscale_mult"], scaled = self.autoscale.update(grads, live, scaled)
            factor = factor * measured["autoscale_mult"]
        gamma = {SPECTRAL: number["lr"] * factor, ELEMENTWISE: number["scalar_lr"] * factor}
        decayed = {SPECTRAL: number["weight_decay"], ELEMENTWISE: number["scalar_weight_decay"]}
        measured["gamma_t"] = gamma[SPECTRAL]

        directions: Tensors = {}
        spectral, scalar = state.spectral, state.scalar
        if isinstance(spectral, SpectralState):
            directions, spectral, sums = self.direction.update(matrices, spectral, number, context.due, self.blocks)
            measured |= self.norms_and_gains(sums, gamma[SPECTRAL])
        if isinstance(scalar, ScaleByAdamState):
            found, scalar = self.adam.update(rest, scalar, part_of(params, ELEMENTWISE), context)
            directions = {**directions, **found}
            if "scalar_grad_norm" in state.measured:
                measured["scalar_grad_norm"] = sum_of_squares(rest, ratio).sqrt()
        if "cautious" in self.components:
            directions = {k: self.cautious(k, u, grads[k]) for k, u in directions.items()}
            if "cautious_keep_frac" in state.measured:
                kept = {k: (directions[k] != 0).to(g.dtype) for k, g in matrices.items()}
                measured["cautious_keep_frac"] = mean_over_matrices(kept, ratio)

        updates: Tensors = {}
        z: Tensors = {}
        for k, p in params.items():
            role = SPECTRAL if is_stacked(k) else ELEMENTWISE
            u, rate = directions[k], gamma[role]
            weight = self.parameters.layer_weight(k, u) if role == SPECTRAL else None
            u = u if weight is None else weight * u
            if "sf" in self.components:
                z[k] = (1 - rate * decayed[role]) * state.z[k] - rate * u
                updates[k] = (z[k] - p) / (state.step_count + 1)
                continue
            updates[k] = -(rate * decayed[role]) * p - rate * u
            if self.hyperball and role == SPECTRAL:
                on_ball = self.on_ball(k, p, u, rate, state.radius[k]) - p
                updates[k] = torch.where(state.radius[k] > 1e-12, on_ball, updates[k])
        radius, shown = copy(state.radius), {name: measured[name] for name in state.measured}
        return updates, FusionOptState(state.step_count + 1, polyak, scaled, spectral, scalar, z, radius, shown)

    def cautious(self, key: str, u: Tensor, g: Tensor) -> Tensor:
        """u where it agrees with the gradient, zero elsewhere, rescaled to the norm of u, parameter by parameter."""
        masked = torch.where(u * g > 0, u, torch.zeros_like(u))
        ratio = self.norms(key, u) / (self.norms(key, masked) + 1e-8)
        return self.parameters.scaled(key, masked, ratio)

    def on_ball(self, key: str, p: Tensor, u: Tensor, rate: Tensor, radius: Tensor) -> Tensor:
        """Hyperball's new weights: a step of `rate` radii along u, brought back to the radius."""
        moved = p - rate * radius * (u / (self.norms(key, u) + 1e-12))
        return radius * moved / (self.norms(key, moved) + 1e-12)

    def norms(self, key: str, x: Tensor) -> Tensor:
        """Norms by parameter, in the form of `BankedParameters.totals`."""
        return self.parameters.totals(key, x * x).sqrt()

    def norms_and_gains(self, sums: Mapping[str, Tensor], gamma: Tensor) -> dict[str, Tensor]:
        """FusionOpt's profile: the size of the update, and the factor by which each part changed it."""
        if not sums:
            return {}
        norm = {name: total.sqrt() for name, total in sums.items() if name != "snr_gain"}
        out = {
            "momentum_norm": norm["momentum"],
            "shampoo_gain": norm["conditioned"] / (norm["momentum"] + 1e-12),
            "ns5_gain": norm["orthogonalized"] / (norm["conditioned"] + 1e-12),
            "normuon_gain": norm["final"] / (norm["orthogonalized"] + 1e-12),
            "spectral_update_norm": gamma * norm["final"],
        }
        out |= {"mona_curvature_norm": norm["curvature"]} if "curvature" in norm else {}
        return out | ({"snr_gain": sums["snr_gain"]} if "snr_gain" in sums else {})

    def diagnostics(self, state: FusionOptState) -> dict[str, Tensor]:
        out = {
            "fusion/step_count": state.step_count,
            "fusion/gnorm_ema": state.polyak.gnorm_ema,
            "fusion/loss_ema": state.polyak.loss_ema,
            "fusion/gamma_curr": state.measured["gamma_curr"],
        }
        out |= {f"comp/{name}": value for name, value in state.measured.items() if name != "gamma_curr"}
        if isinstance(state.autoscale, AutoscaleState):
            out["comp/autoscale_d"] = state.autoscale.d
        return out
