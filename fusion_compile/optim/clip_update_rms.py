"""A bound on the root mean square of each parameter's update (Shazeer & Stern, 1804.04235, section 6)."""

from __future__ import annotations

from collections.abc import Mapping

from fusion_compile._types import Tensors
from fusion_compile.optim._parameter_sums import ParameterSums, prepare_flat, sums_by_bank, sums_for
from fusion_compile.optim._transform import BankInfos, Context, EmptyState, Extras, State, Transform


def clip_update_rms(threshold: float = 1.0) -> Transform:
    """``u / max(1, rms(u) / threshold)``, parameter by parameter.

    Any shape: every matrix of ``[..., m, n]`` is one parameter; a flat bank is split into its parameters once the
    transform is bound, which `compile_training_step` does, and is one parameter before. It bounds the mean, not the
    largest entry. Keeps nothing.
    Source: 1804.04235; K-Optimizers' ``clip_threshold``. Deviations: none.

    Args:
        threshold: d. Larger root mean squares are scaled down to it.

    Returns:
        A transform without a step.

    Raises:
        ValueError: `threshold` is not above 0.

    Example:
        >>> from fusion_compile import optim
        >>> optim.chain(optim.scale_by_factored_rms(), optim.clip_update_rms(1.0)).descends
        False
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold!r} must be above 0, or no parameter moves; inf is no bound.")
    return _clip(threshold, {})


def _clip(threshold: float, flat: Mapping[str, ParameterSums]) -> Transform:
    def init(params: Tensors) -> EmptyState:
        prepare_flat(flat, params)
        return EmptyState()

    def update(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        clipped: Tensors = {}
        for k, u in updates.items():
            parameters = sums_for(flat, k, u)
            rms = (parameters.sums(u * u) / parameters.entries(u).clamp(min=1)).sqrt()
            clipped[k] = parameters.scale(u, 1 / (rms / threshold).clamp(min=1))
        return clipped, state

    def bind(infos: BankInfos) -> Transform:
        return _clip(threshold, sums_by_bank(infos))

    return Transform(init, update, Extras("clip_update_rms", bind=bind))
