"""The classes of ``kaon`` that look for their rate: KProdigy and Autokaon."""

from __future__ import annotations

import functools
import math
from typing import Any

from fusion_compile.optim._kaon_words import autokaon_of, codec_named, kprodigy_of, threshold_of
from fusion_compile.optim._of_kaon import BLOCK, _OfKaon
from fusion_compile.optim.mechanic import BETAS
from fusion_compile.torch_optimizer import Parameters


class KProdigy(_OfKaon):
    """Prodigy in few bytes; see `prodigy`, whose equations are the authors'.

    Deviations from the source: β₁ = 0 trains as the authors' Prodigy (there d never rises); each group has its own d.

    Args:
        params: Parameters, groups, or the model.
        lr: A factor on d.
        betas: Decay of the moments.
        beta3: Decay of the sums behind d; None is √β₂.
        eps: Times d, added to the root of the second moment.
        weight_decay: Per unit of d lr.
        decouple: False adds the decay to the gradient.
        use_bias_correction: Whether Adam's corrections warm d lr up.
        safeguard_warmup: Whether lr is left out of the sums.
        d0: First estimate.
        d_coef: Factor on the estimate.
        growth_rate: Largest factor by which d may grow in one update.
        slice_p: d sees every so manyth entry.
        independent_d: None or True; False only where there is one group.
        momentum_dtype: As in `Adakaon`.
        momentum_4bit_block: 128.
        second_moment: ``"full"`` or ``"factored"``.
        eps_factored: 1e-30.
        cautious: As in `Adakaon`.
        gradient_centralization: As in `Adakaon`.
        bf16_method: As in `Adakaon`.
        **others: Keywords of the source that say nothing here, and this package's own.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number or a word is out of its range; one d for several groups.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kaon import KProdigy
        >>> KProdigy(torch.nn.Linear(4, 2).parameters(), slice_p=11, momentum_dtype="int8").defaults["lr"]
        1.0
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        slice_p: int = 1,
        independent_d: bool | None = None,
        momentum_dtype: str = "bfloat16",
        momentum_4bit_block: int = BLOCK,
        second_moment: str = "full",
        eps_factored: float = 1e-30,
        cautious: bool = False,
        gradient_centralization: bool = True,
        bf16_method: str = "stochastic_rounding",
        **others: Any,
    ) -> None:
        if second_moment not in ("full", "factored") or eps_factored != 1e-30:
            raise ValueError(
                f"second_moment={second_moment!r}, eps_factored={eps_factored!r}: give 'full' or 'factored', and 1e-30."
            )
        options: dict[str, Any] = {"lr": lr, "betas": betas, "beta3": beta3, "eps": eps, "weight_decay": weight_decay}
        options |= {"decouple": decouple, "use_bias_correction": use_bias_correction, "d0": d0, "d_coef": d_coef}
        options |= {"safeguard_warmup": safeguard_warmup, "growth_rate": growth_rate, "slice_p": slice_p}
        options |= {"momentum": codec_named(momentum_dtype, momentum_4bit_block), "is_cautious": cautious}
        options["second_moment"] = "factored" if second_moment == "factored" else "fp32"
        options["centralize"] = gradient_centralization
        self._begin(params, functools.partial(kprodigy_of, **options), bf16_method, others)
        if independent_d is False and len(self.param_groups) > 1:
            raise ValueError("independent_d=False with several groups: each has its own d here; give one group.")

    def get_d(self) -> float:
        """The estimate of the last step; d0 before the first. Waits for the device.

        Returns:
            d of the first group.
        """
        return _shown(self, "comp/prodigy_d", float(self._inside.source.keywords["d0"]))  # type: ignore[union-attr]


class Autokaon(_OfKaon):
    """Adakaon whose rate Mechanic looks for; see `autokaon`, and what it says of the result.

    The first weights stay in memory after the freeze, 4 bytes a parameter; `Adakaon` with ``lr=optimizer.get_d()``
    frees them (β₁ = 0: the same steps go on).

    Args:
        params: Parameters, groups, or the model. Each group looks for its own rate.
        lr: A factor on the scale.
        s_init: The scale to start from; ``"auto"`` is 0.003 of the root mean square of all weights.
        lr_freeze: After so many updates the scale is kept; ``"auto"`` once it stands still; None never.
        scale_cap: Upper bound on the scale; ``"auto"`` is `scale_cap_rel` times the first; None is no bound.
        scale_cap_rel: See `scale_cap`.
        betas: Memories of the tuners.
        s_decay: Pull towards the first weights.
        eps: Added where the tuners divide.
        adakaon_betas: β₁ and β₂ of Adakaon.
        weight_decay: As in `Adakaon`.
        clip_threshold: As in `Adakaon`.
        momentum_dtype: As in `Adakaon`.
        momentum_4bit_block: 128.
        cautious: As in `Adakaon`.
        gradient_centralization: As in `Adakaon`.
        bf16_method: As in `Adakaon`.
        **others: Keywords of the source that say nothing here, and this package's own.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number or a word is out of its range; a fixed `scale_cap` beside ``s_init="auto"``.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kaon import Autokaon
        >>> Autokaon(torch.nn.Linear(4, 2).parameters(), lr_freeze=500).defaults["lr"]
        1.0
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1.0,
        *,
        s_init: float | str = "auto",
        lr_freeze: int | str | None = "auto",
        scale_cap: float | str | None = "auto",
        scale_cap_rel: float = 6.0,
        betas: tuple[float, ...] = BETAS,
        s_decay: float = 0.01,
        eps: float = 1e-8,
        adakaon_betas: tuple[float, float] = (0.0, 0.999),
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        momentum_dtype: str = "bfloat16",
        momentum_4bit_block: int = BLOCK,
        cautious: bool = True,
        gradient_centralization: bool = True,
        bf16_method: str = "stochastic_rounding",
        **others: Any,
    ) -> None:
        relative = s_init == "auto"
        first = 3e-3 if isinstance(s_init, str) else s_init
        most = scale_cap_rel if scale_cap == "auto" else math.inf
        if not isinstance(scale_cap, str) and scale_cap is not None:
            if relative:
                raise ValueError(f"scale_cap={scale_cap!r} with s_init='auto'; give s_init, too, or scale_cap_rel.")
            most = scale_cap / first
        tuner = {"s_init": first, "relative": relative, "bounds": (0.5, most), "freeze": lr_freeze, "betas": betas}
        tuner |= {"decay": s_decay, "eps": eps}
        options: dict[str, Any] = {"lr": lr, "betas": adakaon_betas, "weight_decay": weight_decay}
        options |= {"momentum": codec_named(momentum_dtype, momentum_4bit_block), "is_cautious": cautious}
        options |= {"centralize": gradient_centralization, "clip_threshold": threshold_of(clip_threshold)}
        self._begin(params, functools.partial(autokaon_of, tuner, options), bf16_method, others)

    def get_d(self) -> float:
        """The scale of the last step; 0 before the first. Waits for the device.

        Returns:
            S of the first group.
        """
        return _shown(self, "comp/mechanic_s", 0.0)


def _shown(optimizer: _OfKaon, name: str, otherwise: float) -> float:
    shown = optimizer.diagnostics
    found = next((value for key, value in shown.items() if key.endswith(name)), None)
    return otherwise if found is None else float(found)
