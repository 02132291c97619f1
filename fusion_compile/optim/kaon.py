"""K-Optimizers' classes under their own names: change ``from kaon import Adakaon`` to this module, and go on.

Keywords, their order and their defaults are those of kaon 0.7.4 (Autokaon: 0.4.0), and so are the trajectories. Each is
a recipe of this package, whose docstring has the equation and all deviations: the mask grows no entry by more than
1,000, ``p.grad`` is never changed, non-contiguous parameters move, stochastic rounding leaves the global generator
alone, and a resume in bfloat16 is exact. ``foreach``, ``fused``, ``compile`` and their sizes say nothing here, because
an update is one program. Each class takes this package's ``model``, ``mode`` and ``backend`` besides; see
`as_torch_optimizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from fusion_compile.optim._kaon_words import (
    adamuon_of,
    codec_named,
    form_named,
    lion_of,
    threshold_of,
)
from fusion_compile.optim._of_kaon import BLOCK, _OfKaon
from fusion_compile.optim.kaon_recipes import adakaon, adapnm, nekaon
from fusion_compile.optim.kaon_without_rate import Autokaon as Autokaon
from fusion_compile.optim.kaon_without_rate import KProdigy as KProdigy
from fusion_compile.torch_optimizer import Parameters


class Adakaon(_OfKaon):
    """Adafactor's direction, clipped, with momentum behind it and a cautious mask; see `adakaon`.

    Args:
        params: Parameters, groups, or the model.
        lr: Size of a step of one entry.
        betas: β₁ = 0 keeps no momentum.
        eps: The first is added to squares; the second is not used.
        weight_decay: Per unit of lr.
        clip_threshold: Bound on the root mean square of each direction; 0 for none.
        momentum_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"4bit"``.
        momentum_4bit_block: 128.
        cautious: Whether entries that disagree with the gradient stand still.
        gradient_centralization: Whether the mean of each row of the gradient is subtracted first.
        bf16_method: ``"stochastic_rounding"``, ``"kahan"``, ``"kahan16"`` (the exact fp32 weights) or ``"none"``.
        **others: Keywords of the source that say nothing here, and this package's own.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number or a word is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kaon import Adakaon
        >>> optimizer = Adakaon(torch.nn.Linear(4, 2).parameters(), lr=1e-4, betas=(0.0, 0.999), foreach=True)
        >>> optimizer.param_groups[0]["lr"]
        0.0001
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: tuple[float, float] = (1e-30, 1e-3),
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        momentum_dtype: str = "bfloat16",
        momentum_4bit_block: int = BLOCK,
        cautious: bool = True,
        gradient_centralization: bool = True,
        bf16_method: str = "stochastic_rounding",
        **others: Any,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps[0]}
        options |= {"momentum": codec_named(momentum_dtype, momentum_4bit_block), "is_cautious": cautious}
        options |= {"centralize": gradient_centralization, "clip_threshold": threshold_of(clip_threshold)}
        self._begin(params, functools.partial(adakaon, **options), bf16_method, others)


class Nekaon(_OfKaon):
    """Adakaon with the gradient k momenta ahead; see `nekaon`.

    Between steps the parameters hold the point ahead, as in the source, and the weights after ``eval()``; a checkpoint
    has both. Deviations: `low_vram_above` gives the large parameters the source's numbers, but not its memory; bf16
    parameters are updated with an fp32 copy of the weights, 4 bytes, whatever `bf16_method` is.

    Args:
        params: Parameters, groups, or the model.
        lr: Size of a step of one entry.
        k: How many momenta; 0 is Adakaon.
        betas: β₁ above 0.
        weight_decay: Per unit of lr.
        momentum_dtype: As in `Adakaon`.
        low_vram_above: Larger parameters get no momentum and no look-ahead. Parameters must be plain.
        low_vram_lr_ratio: Their lr over `lr`.
        eps: As in `Adakaon`.
        clip_threshold: Bound on the root mean square of each direction, and of the look-ahead by entry.
        momentum_4bit_block: 128.
        cautious: As in `Adakaon`.
        gradient_centralization: As in `Adakaon`.
        bf16_method: As in `Adakaon`, where k = 0.
        **others: Keywords of the source that say nothing here, and this package's own.

    Raises:
        TypeError: A keyword is not known, or `low_vram_above` meets groups.
        ValueError: A number or a word is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kaon import Nekaon
        >>> optimizer = Nekaon(torch.nn.Linear(4, 2).parameters(), lr=1e-3, k=1.5)
        >>> optimizer.eval()  # before sampling
        >>> optimizer.train()
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        k: float = 1.5,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 0.1,
        momentum_dtype: str = "4bit",
        *,
        low_vram_above: int | None = None,
        low_vram_lr_ratio: float = 0.5,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        momentum_4bit_block: int = BLOCK,
        cautious: bool = True,
        gradient_centralization: bool = True,
        bf16_method: str = "stochastic_rounding",
        **others: Any,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "k": k, "eps": eps[0]}
        options |= {"momentum": codec_named(momentum_dtype, momentum_4bit_block), "is_cautious": cautious}
        options |= {"centralize": gradient_centralization, "clip_threshold": threshold_of(clip_threshold)}
        if low_vram_above is not None:
            ahead = {} if k == 0 else {"look_ahead": 0.0}
            params = _by_size(params, low_vram_above, {"lr": low_vram_lr_ratio * lr, "beta1": 0.0, **ahead})
        self._begin(params, functools.partial(nekaon, **options), bf16_method, others)
        self._keep_weights_as("master" if k != 0 else form_named(bf16_method))


def _by_size(params: Parameters, largest: int, numbers: Mapping[str, float]) -> list[dict[str, Any]]:
    given = list(params.parameters() if isinstance(params, nn.Module) else params)
    if any(isinstance(entry, dict) for entry in given):
        raise TypeError("low_vram_above was given parameter groups; give plain parameters, which it splits by size.")
    large = [p for p in given if (p[1] if isinstance(p, tuple) else p).numel() > largest]
    chosen = set(map(id, large))
    rest = [p for p in given if id(p) not in chosen]
    return [{"params": part, **own} for part, own in ((rest, {}), (large, numbers)) if part]


class AdaMuon(_OfKaon):
    """Momentum, two Newton-Schulz iterations and a factored second moment on every matrix; see `adamuon`.

    Args:
        params: Parameters, groups, or the model.
        lr: An update has root mean square 0.2 lr at most. The source's default is its own; it recommends 1e-3.
        betas: β₁ of the momentum and β₂ of the second moment.
        eps: As in `Adakaon`.
        weight_decay: Per unit of lr.
        ns_steps: Newton-Schulz iterations, 1 to 5.
        clip_threshold: As in `Adakaon`.
        momentum_dtype: As in `Adakaon`.
        momentum_4bit_block: 128.
        cautious: As in `Adakaon`.
        gradient_centralization: As in `Adakaon`.
        bf16_method: As in `Adakaon`.
        matmul_dtype: Of the products; this package's own, see `orthogonalize`.
        **others: Keywords of the source that say nothing here, and this package's own.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number or a word is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kaon import AdaMuon
        >>> AdaMuon(torch.nn.Linear(4, 2).parameters(), lr=1e-3, momentum_dtype="int8").defaults["beta1"]
        0.95
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 2e-2,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: tuple[float, float] = (1e-30, 1e-3),
        weight_decay: float = 0.0,
        *,
        ns_steps: int = 2,
        clip_threshold: float = 1.0,
        momentum_dtype: str = "bfloat16",
        momentum_4bit_block: int = BLOCK,
        cautious: bool = True,
        gradient_centralization: bool = False,
        bf16_method: str = "stochastic_rounding",
        matmul_dtype: Any = "auto",
        **others: Any,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps[0]}
        options |= {"momentum": codec_named(momentum_dtype, momentum_4bit_block), "is_cautious": cautious}
        options |= {"centralize": gradient_centralization, "clip_threshold": threshold_of(clip_threshold)}
        options |= {"ns_steps": ns_steps, "matmul_dtype": matmul_dtype}
        self._begin(params, functools.partial(adamuon_of, **options), bf16_method, others)


class Lion(_OfKaon):
    """Lion with a cautious mask around step and decay; see `scale_by_lion`.

    Args:
        params: Parameters, groups, or the model.
        lr: Every entry moves by it.
        betas: β₁ of the step and β₂ of the momentum.
        weight_decay: Per unit of lr, inside the mask.
        momentum_dtype: As in `Adakaon`.
        momentum_4bit_block: 128.
        cautious: As in `Adakaon`.
        gradient_centralization: As in `Adakaon`.
        bf16_method: As in `Adakaon`.
        **others: Keywords of the source that say nothing here, and this package's own.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number or a word is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kaon import Lion
        >>> Lion(torch.nn.Linear(4, 2).parameters(), momentum_dtype="4bit").defaults["beta2"]
        0.99
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        momentum_dtype: str = "bfloat16",
        momentum_4bit_block: int = BLOCK,
        cautious: bool = True,
        gradient_centralization: bool = True,
        bf16_method: str = "stochastic_rounding",
        **others: Any,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "is_cautious": cautious}
        options |= {"momentum": codec_named(momentum_dtype, momentum_4bit_block)}
        options |= {"centralize": gradient_centralization}
        self._begin(params, functools.partial(lion_of, **options), bf16_method, others)


class AdaPNM(_OfKaon):
    """Positive-negative momentum over a factored second moment; see `adapnm`.

    Args:
        params: Parameters, groups, or the model.
        lr: Size of a step of one entry.
        betas: β₁ of the two averages and β₂.
        beta0: How much the gradient's noise is turned up.
        eps: As in the source: a floor of 1e-4 under gradients. `adapnm` has none by default.
        weight_decay: Per unit of lr, outside of the mask.
        clip_threshold: As in `Adakaon`.
        cautious: As in `Adakaon`.
        gradient_centralization: As in `Adakaon`.
        ams_bound: Whether vectors count the largest second moment so far; matrices have none, as in the source.
        momentum_dtype: As in `Adakaon`.
        momentum_4bit_block: 128.
        bf16_method: As in `Adakaon`.
        **others: Keywords of the source that say nothing here, and this package's own.

    Raises:
        TypeError: A keyword is not known.
        ValueError: A number or a word is out of its range.

    Example:
        >>> import torch
        >>> from fusion_compile.optim.kaon import AdaPNM
        >>> AdaPNM(torch.nn.Linear(4, 2).parameters(), lr=1e-3).defaults["pnm_beta0"]
        0.5
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.8, 0.999),
        beta0: float = 0.5,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        cautious: bool = True,
        gradient_centralization: bool = True,
        ams_bound: bool = False,
        momentum_dtype: str = "bfloat16",
        momentum_4bit_block: int = BLOCK,
        bf16_method: str = "stochastic_rounding",
        **others: Any,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "beta0": beta0, "eps": eps}
        options |= {"momentum": codec_named(momentum_dtype, momentum_4bit_block), "is_cautious": cautious}
        options |= {"centralize": gradient_centralization, "clip_threshold": threshold_of(clip_threshold)}
        options["amsgrad"] = ams_bound
        self._begin(params, functools.partial(adapnm, **options), bf16_method, others)
