"""FusionOpt's direction of a matrix: Shampoo factors, MONA, Newton-Schulz, row scaling, a signal-to-noise gate.

Each part follows FusionOpt instead of its paper; `fusionopt_compat` says where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._kronecker import eye_like, zero_factors
from fusion_compile.optim._total import total, total_of_rows
from fusion_compile.optim._transform import Blocks
from fusion_compile.optim._tree import copy, map_tensors, number_like, weighted_mean, zeros_like
from fusion_compile.optim.matrix.inverse_roots import inverse_root

HOT_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp16_safe": torch.float16,
}
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDING = 2.0**-23


class SnrState(NamedTuple):
    """`mean`: ``[..., m, n]``; `square`: ``[..., m, 1]``, by element ``[..., m, n]``; `beta_power`: βᵗ, 0-dim."""

    mean: Tensors
    square: Tensors
    beta_power: Tensor


class ShampooState(NamedTuple):
    """`left`, `right`: factors ``[..., m, m]`` and ``[..., n, n]``; `left_root`, `right_root`: their roots in use."""

    left: Tensors
    right: Tensors
    left_root: Tensors
    right_root: Tensors


class SpectralState(NamedTuple):
    """`momentum`, `curvature`, `last_gradient`: ``[..., m, n]``; `row_square`: ``[..., m, 1]``. The state of a
    component that is off is empty, or an empty tuple."""

    momentum: Tensors
    curvature: Tensors
    last_gradient: Tensors
    row_square: Tensors
    shampoo: ShampooState | tuple[()]
    snr: SnrState | tuple[()]


@dataclass(frozen=True)
class SpectralDirection:
    """Maps gradients of matrices to directions. `safe_fp16`: Newton-Schulz in guarded fp16 products; `telemetry`:
    whether to measure the effect of each part."""

    components: frozenset[str]
    hot_dtype: torch.dtype
    safe_fp16: bool
    snr_mode: str
    snr_source: str
    snr_floor: float
    snr_power: float
    telemetry: bool

    def init(self, params: Tensors) -> SpectralState:
        """All zeros, except that roots start as the identity. `params`: at least one matrix."""

        def zeros(component: str | None) -> Tensors:
            wanted = component is None or component in self.components
            return zeros_like(params) if wanted else {}

        def rows(of: Tensors) -> Tensors:
            return map_tensors(lambda p: torch.zeros_like(p[..., :1]), of)

        shampoo: ShampooState | tuple[()] = ()
        if "shampoo" in self.components:
            left, right = zero_factors(params, "fusionopt_compat")
            shampoo = ShampooState(left, right, map_tensors(eye_like, left), map_tensors(eye_like, right))
        snr: SnrState | tuple[()] = ()
        if "snr" in self.components:
            mean = zeros("snr")
            snr = SnrState(mean, rows(mean) if self.snr_mode == "row" else zeros("snr"), number_like(params, 1.0))
        return SpectralState(zeros(None), zeros("mona"), zeros("mona"), rows(zeros("normuon")), shampoo, snr)

    def measured(self) -> tuple[str, ...]:
        """Names of what `update` measures: sums of squares, and ``snr_gain``, a mean."""
        parts = {"mona": "curvature", "snr": "snr_gain"}
        own = tuple(name for component, name in parts.items() if component in self.components)
        return ("momentum", "conditioned", "orthogonalized", "final", *own) if self.telemetry else ()

    def update(
        self,
        grads: Tensors,
        state: SpectralState,
        numbers: Mapping[str, Tensor],
        due: bool,
        blocks: Mapping[str, Blocks],
    ) -> tuple[Tensors, SpectralState, dict[str, Tensor]]:
        """Directions (before cautious masking), the new state, and the values of `measured`, summed over all matrices.
        `numbers`: the live numbers by FusionOpt's names; `blocks`: by bank, the blocks that are orthogonalized each by
        itself."""
        shampoo = state.shampoo
        if isinstance(shampoo, ShampooState):
            shampoo = _update_shampoo(shampoo, grads, numbers["beta_k"], numbers["shampoo_delta"], due)
        curvature, last, added = dict(state.curvature), dict(state.last_gradient), dict(grads)
        if "mona" in self.components:
            for k, g in grads.items():
                curvature[k] = numbers["beta_n"] * state.curvature[k] + (g - state.last_gradient[k])
                last[k] = g.clone()
                added[k] = g + numbers["mona_alpha"] * curvature[k]
        momentum = {k: numbers["mu"] * state.momentum[k] + a for k, a in added.items()}

        directions: Tensors = {}
        row_square: Tensors = {}
        conditioned: Tensors = {}
        orthogonalized: Tensors = {}
        for k, m in momentum.items():
            hot = m.to(self.hot_dtype)
            if isinstance(shampoo, ShampooState):
                hot = shampoo.left_root[k].to(hot.dtype) @ hot @ shampoo.right_root[k].to(hot.dtype)
            conditioned[k] = hot
            u = self._orthogonalized(hot, blocks.get(k)).to(m.dtype) if "ns5" in self.components else hot.to(m.dtype)
            orthogonalized[k] = u
            if "normuon" in self.components:
                squares = u.square().sum(-1, keepdim=True)
                row_square[k] = numbers["beta_r"] * state.row_square[k] + (1 - numbers["beta_r"]) * squares
                u = u / row_square[k].clamp(min=1e-12).sqrt()
            directions[k] = u
        gates: Tensors = {}
        snr = state.snr
        if isinstance(snr, SnrState):
            gates, snr = self._gates(grads if self.snr_source == "grad" else directions, snr, numbers["snr_beta"])
            directions = {k: gates[k] * u for k, u in directions.items()}
        new_state = SpectralState(momentum, curvature, last, row_square, shampoo, snr)

        found: dict[str, Tensor] = {}
        if self.telemetry:
            between = {"momentum": momentum, "conditioned": conditioned, "orthogonalized": orthogonalized}
            between |= {"final": directions} | ({"curvature": curvature} if "mona" in self.components else {})
            found = {name: sum_of_squares(tensors, numbers["mu"]) for name, tensors in between.items()}
            if "snr" in self.components:
                found["snr_gain"] = mean_over_matrices(gates, numbers["mu"])
        return directions, new_state, {name: found[name] for name in self.measured()}

    def _orthogonalized(self, m: Tensor, blocks: Blocks | None) -> Tensor:
        """``√max(1, r/c) · NS(m)``, for each block with its own sides."""
        iterate = _newton_schulz_guarded if self.safe_fp16 else _newton_schulz
        parts = [m] if blocks is None else list(torch.split(m, list(blocks.sizes), blocks.axis))
        # The factor multiplies the result in full precision.
        done = [max(1.0, p.size(-2) / p.size(-1)) ** 0.5 * _at_least_fp32(iterate(p)) for p in parts]
        return done[0] if blocks is None else torch.cat(done, blocks.axis)

    def _gates(self, of: Tensors, state: SnrState, beta: Tensor) -> tuple[Tensors, SnrState]:
        """``max(floor, min(1, |mean| / √square)^power)``, by row or element, both averages bias-corrected."""
        power = state.beta_power * beta
        by_row = self.snr_mode == "row"
        gates, mean, square = {}, {}, {}
        for k, r in of.items():
            mean[k] = beta * state.mean[k] + (1 - beta) * r
            now = r.square().sum(-1, keepdim=True) if by_row else r.square()
            square[k] = beta * state.square[k] + (1 - beta) * now
            signal = mean[k] / (1 - power)
            size = signal.square().sum(-1, keepdim=True).sqrt() if by_row else signal.abs()
            gate = (size / (square[k] / (1 - power)).clamp(min=1e-30).sqrt()).clamp(max=1.0)
            gates[k] = (gate if self.snr_power == 1.0 else gate**self.snr_power).clamp(min=self.snr_floor)
        return gates, SnrState(mean, square, power)


def _update_shampoo(state: ShampooState, grads: Tensors, beta: Tensor, delta: Tensor, due: bool) -> ShampooState:
    left = weighted_mean(state.left, map_tensors(lambda g: g @ g.mT, grads), beta)
    right = weighted_mean(state.right, map_tensors(lambda g: g.mT @ g, grads), beta)
    if due:
        roots = [map_tensors(lambda m: _root(m, delta), side) for side in (left, right)]
    else:
        roots = [copy(state.left_root), copy(state.right_root)]
    return ShampooState(left, right, *roots)


def _root(m: Tensor, delta: Tensor) -> Tensor:
    """``(½(M + Mᵀ) + ρ I)^(-1/4)`` with ρ = max(δ, 2^-22 ‖M‖), in fp64.

    FusionOpt computes it by an eigendecomposition, which cannot be captured, with ρ = δ and eigenvalues clamped at
    1e-12. Below 2^-22 of the norm the eigenvalues of an fp32 factor are rounding noise, and some of them negative.
    """
    wide = (0.5 * (m + m.mT)).double()
    norm = wide.abs().sum(-1).amax(-1)[..., None, None]
    ridge = torch.maximum(delta.double(), 2 * ROUNDING * norm)
    # `inverse_root` adds a ridge of its own, relative to the norm of its argument; together they are ρ.
    before = (ridge - ROUNDING * norm) / (1 + ROUNDING)
    identity = torch.eye(m.size(-1), dtype=wide.dtype, device=m.device)
    return inverse_root(wide + before * identity, 4, ridge=ROUNDING).to(m.dtype)


def _newton_schulz(m: Tensor) -> Tensor:
    """Five iterations in m's own dtype, of m over its norm *in that dtype*: in fp16, where the offset 1e-12 is zero, a
    zero matrix gives nan and a norm above 65,504 gives zero."""
    wide = _at_least_fp32(m)
    norm = wide.square().sum(-1, keepdim=True).sum(-2, keepdim=True).sqrt().to(m.dtype)
    x = m / (norm if m.dtype == torch.float16 else norm + 1e-12)
    tall = m.size(-2) > m.size(-1)
    x = x.mT if tall else x
    for _ in range(5):
        s = x @ x.mT
        x = A * x + (B * s + C * (s @ s)) @ x
    return x.mT if tall else x


def _newton_schulz_guarded(m: Tensor) -> Tensor:
    """The iterations in fp32 with products in fp16, each operand over its largest entry where that exceeds 1."""
    x = m.float()
    x = x / (x.square().sum(-1, keepdim=True).sum(-2, keepdim=True).sqrt() + 1e-12)
    tall = m.size(-2) > m.size(-1)
    x = x.mT if tall else x
    for _ in range(5):
        s = _guarded_product(x, x.mT)
        x = A * x + _guarded_product(B * s + C * _guarded_product(s, s), x)
    return x.mT if tall else x


def _guarded_product(p: Tensor, q: Tensor) -> Tensor:
    by_p, by_q = (t.abs().amax((-2, -1), keepdim=True).clamp(min=1.0) for t in (p, q))
    return ((p / by_p).half() @ (q / by_q).half()).float() * (by_p * by_q)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_of_squares(tensors: Tensors, like: Tensor) -> Tensor:
    """Over all entries of all tensors, 0-dim, in the dtype of `like`."""
    return total([t.to(like.dtype).square() for t in tensors.values()], torch.zeros_like(like))


def mean_over_matrices(tensors: Tensors, like: Tensor) -> Tensor:
    """The mean over all matrices of each one's mean entry, 0-dim."""
    means = [t.mean((-2, -1)).reshape(-1) for t in tensors.values()]
    return total_of_rows(means, torch.zeros_like(like)) / max(1, sum([mean.numel() for mean in means]))
