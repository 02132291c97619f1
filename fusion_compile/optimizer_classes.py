"""Recipes as optimizer classes, ``AdamW(params, lr=…)``, for trainers and registries that are given a class's path."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from fusion_compile._torch_optim.torch_words import MAXIMIZE, without_torchs_words
from fusion_compile.optim._registry import factory_of, names
from fusion_compile.optim._schedules import Schedule
from fusion_compile.torch_optimizer import Parameters, TorchOptimizer


class _OfRecipe(TorchOptimizer):
    """`as_torch_optimizer` with the recipe in the class.

    Args:
        params: The model, named or plain parameters, or groups; see `as_torch_optimizer`.
        lr: Replaces the recipe's, a number, a tensor or a schedule.
        model: The model that plain parameters belong to.
        mode: One of torch.compile's modes, or ``"eager"``.
        backend: A torch.compile backend.
        force_scalar: Regular expressions over full parameter names that are updated entry by entry.
        force_spectral: Regular expressions over full parameter names that are updated as matrices.
        **options: The recipe's own (``betas``, ``eps``, ``weight_decay``, …), ``half_precision`` and
            ``release_gradients`` as in `as_torch_optimizer`, and torch's ``maximize``. ``foreach``, ``fused`` and
            ``capturable`` say nothing here.

    Raises:
        TypeError: The recipe has no such option, or a parameter is none.
        ValueError: A number is out of its range; an option asks for another optimizer (``amsgrad=True``).
    """

    _recipe: ClassVar[str]

    def __init_subclass__(cls, **rest: Any) -> None:
        """The recipe of a class of this package is the one with its name: `SFAdamW` is `sf_adamw`."""
        super().__init_subclass__(**rest)
        spelled = {name.replace("_", ""): name for name in names()}
        if _OfRecipe in cls.__bases__ and (recipe := spelled.get(cls.__name__.lower())):
            cls._recipe = recipe

    def __init__(
        self,
        params: Parameters,
        lr: float | Schedule | None = None,
        *,
        model: nn.Module | None = None,
        mode: str | None = None,
        backend: str = "inductor",
        force_scalar: Sequence[str] = (),
        force_spectral: Sequence[str] = (),
        **options: Any,
    ) -> None:
        own = without_torchs_words(options, type(self).__name__)
        maximize, half_precision = bool(own.pop(MAXIMIZE, False)), own.pop("half_precision", "master")
        released = bool(own.pop("release_gradients", False))
        factory = factory_of(self._recipe)
        assert factory is not None
        try:
            factory(**own)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}; its options are those of optim.{self._recipe}.") from None
        super().__init__(
            params,
            functools.partial(factory, **own) if own else self._recipe,
            lr=lr,
            mode=mode,
            backend=backend,
            force_scalar=force_scalar,
            force_spectral=force_spectral,
            model=model,
        )
        self._keep_weights_as(half_precision)
        if maximize:
            self._go_uphill()
        self._release_gradients(released)


class AdamW(_OfRecipe):
    """`adamw` as a class, in the place of ``torch.optim.AdamW``.

    See `as_torch_optimizer` for what it does, and `adamw` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fc.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        >>> optimizer.param_groups[0]["betas"]
        (0.9, 0.95)
    """


class Lion(_OfRecipe):
    """`lion` as a class. See `as_torch_optimizer` for what it does, and `lion` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Lion(torch.nn.Linear(4, 2).parameters(), lr=1e-4).defaults["beta2"]
        0.99
    """


class SFAdamW(_OfRecipe):
    """`sf_adamw` as a class. See `as_torch_optimizer` for what it does, and `sf_adamw` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> optimizer = fc.optim.SFAdamW(torch.nn.Linear(4, 2).parameters(), lr=2.5e-3)
        >>> optimizer.eval()  # the average x, to evaluate or save the model
    """


class Muon(_OfRecipe):
    """`muon` as a class. See `as_torch_optimizer` for what it does, and `muon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 2))
        >>> optimizer = fc.optim.Muon(model.parameters(), lr=0.02, model=model)
        >>> optimizer.defaults["momentum"]
        0.95
    """


class NorMuon(_OfRecipe):
    """`normuon` as a class. See `as_torch_optimizer` for what it does, and `normuon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 2))
        >>> fc.optim.NorMuon(model, lr=0.02).defaults["betas"]
        (0.95, 0.95)
    """


class SFNorMuon(_OfRecipe):
    """`sf_normuon` as a class. See `as_torch_optimizer` for what it does, and `sf_normuon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> optimizer = fc.optim.SFNorMuon(torch.nn.Linear(4, 2), lr=8e-3)
        >>> optimizer.training
        True
    """


class SOAP(_OfRecipe):
    """`soap` as a class. See `as_torch_optimizer` for what it does, and `soap` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.SOAP(torch.nn.Linear(4, 2), lr=3e-3).defaults["shampoo_beta"]
        0.95
    """


class FullFusion(_OfRecipe):
    """`full_fusion` as a class. See `as_torch_optimizer` for what it does, and `fusion` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.FullFusion(torch.nn.Linear(4, 2), lr=8e-3).defaults["lr"]
        0.008
    """
