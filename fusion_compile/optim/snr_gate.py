"""The SNR gate of FusionOpt: rows or entries whose gradient is noise move less. No paper; their own invention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._total import total
from fusion_compile.optim._transform import Context, Number, State, Transform, by_name, check_transform, declare
from fusion_compile.optim._tree import map_tensors, number_like, zeros_like

MODES = ("row", "element")
SOURCES = ("gradient", "update")


class SnrGateState(NamedTuple):
    """`base`: the wrapped transform's state. `mean`: average of the source, shaped like the parameters; `square`: of
    its squares, ``[..., m, 1]`` by row, else like the parameters. `beta_power`: βᵗ; `gain`: the last step's mean gain;
    both 0-dim."""

    base: State
    mean: Tensors
    square: Tensors
    beta_power: Tensor
    gain: Tensor


def snr_gate(
    base: Transform,
    *,
    beta: Number = 0.9,
    mode: str = "row",
    source: str = "gradient",
    floor: Number = 0.0,
    power: float = 1.0,
) -> Transform:
    """``gain · base(g)``: rows or entries whose gradient is noise move less.

    The gain is the ratio of the source's average to the root of its average square, at most 1::

        M ← β M + (1 - β) s        V ← β V + (1 - β) Σ_j s_ij²         (both divided by 1 - βᵗ)
        gain_i = max(floor, min(1, ‖M_i‖ / √V_i)^power)

    A steady source has gain 1, white noise √((1 - β) / (1 + β)): 0.23 at 0.9. The result no longer has the size that
    lr was chosen for. 4 bytes a parameter and 4 a row; in element mode 8 bytes a parameter. Diagnostic:
    ``comp/snr_gain``, the mean gain over all rows or entries (a flat bank's padding counts, with the floor).
    Source: FusionOpt's ``snr_gate``. Deviations: none (its floor of 1e-30 under V is kept).

    Args:
        base: Gives the direction that is scaled.
        beta: Decay of both averages. Live as ``snr_beta``.
        mode: ``"row"``: one gain for each row of ``[..., m, n]``; ``"element"``: one for each entry (V then has no
            sum), for any shape including flat banks.
        source: s is the ``"gradient"`` that comes in, or the ``"update"`` of `base` (already smoothed by its momentum,
            so the gate hardly closes).
        floor: Smallest gain. Live as ``snr_floor``.
        power: Exponent of the ratio.

    Returns:
        `base` with the gate behind it; it takes a step if `base` does.

    Raises:
        ValueError: `mode`, `source` or `power` is not one of the above; `base` moves the gradient point. `init` refuses
            banks that are not matrices in row mode.

    Example:
        >>> from fusion_compile import optim
        >>> matrices = optim.chain(optim.snr_gate(optim.orthogonalize(0.95)), optim.scale_by_learning_rate(0.02))
        >>> matrices.hyperparameters["snr_beta"]
        0.9
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; use one of {', '.join(map(repr, MODES))}.")
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is not known; use one of {', '.join(map(repr, SOURCES))}.")
    if not power > 0:
        raise ValueError(f"power={power} must be positive; 1 is the plain ratio.")
    check_transform("snr_gate(), base,", base)
    if base.gradient_point is not None:
        raise ValueError(f"{base.name} moves the gradient point; wrap snr_gate() in it, not it in snr_gate().")
    b, f = declare("snr_beta", beta), declare("snr_floor", floor)

    def per_gain(t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True) if mode == "row" else t

    def init(params: Tensors) -> SnrGateState:
        for k, p in params.items():
            if mode == "row" and p.ndim < 2:
                raise ValueError(
                    f"snr_gate(mode='row') needs matrices, and bank {k!r} is {list(p.shape)}; use mode='element' there."
                )
        square = map_tensors(lambda p: torch.zeros_like(p[..., :1] if mode == "row" else p), params)
        one, zero = number_like(params, 1.0), number_like(params, 0.0)
        return SnrGateState(base.init(params), zeros_like(params), square, one, zero)

    def update(
        updates: Tensors, state: SnrGateState, params: Tensors, context: Context
    ) -> tuple[Tensors, SnrGateState]:
        h = context.hyperparameters
        beta, floor = h[b.name], h[f.name]
        directions, base_state = base.update(updates, state.base, params, context)
        beta_power = state.beta_power * beta
        mean, square, gated = {}, {}, {}
        gains: list[Tensor] = []
        for k, u in directions.items():
            s = updates[k] if source == "gradient" else u
            mean[k] = beta * state.mean[k] + (1 - beta) * s
            square[k] = beta * state.square[k] + (1 - beta) * per_gain(s * s)
            m, v = mean[k] / (1 - beta_power), square[k] / (1 - beta_power)
            ratio = (per_gain(m * m).sqrt() if mode == "row" else m.abs()) / v.clamp(min=1e-30).sqrt()
            gain = ratio.clamp(max=1.0)
            gain = torch.maximum(gain if power == 1 else gain.pow(power), floor)
            gated[k] = gain * u
            gains.append(gain)
        found = total(gains, torch.zeros_like(state.gain)) / max(sum([gain.numel() for gain in gains]), 1)
        return gated, SnrGateState(base_state, mean, square, beta_power, found)

    def diagnostics(state: SnrGateState) -> Mapping[str, Tensor]:
        return {"comp/snr_gain": state.gain}

    def rebuild(base: Transform) -> Transform:
        return snr_gate(base, beta=b, mode=mode, source=source, floor=f, power=power)

    name = f"snr_gate({base.name})"
    return Transform(init, update, wrap(base, name, by_name(b, f), diagnostics=diagnostics, rebuild=rebuild))
