"""The low-memory recipes as optimizer classes, ``Adakaon(params, lr=…)``; see ``optimizer_classes``."""

from __future__ import annotations

from fusion_compile.optimizer_classes import _OfRecipe


class Adakaon(_OfRecipe):
    """`adakaon` as a class. See `as_torch_optimizer` for what it does, and `adakaon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Adakaon(torch.nn.Linear(4, 2), lr=0.01, betas=(0.0, 0.999)).defaults["lr"]
        0.01
    """

    _recipe = "adakaon"


class Nekaon(_OfRecipe):
    """`nekaon` as a class. See `as_torch_optimizer` for what it does, and `nekaon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Nekaon(torch.nn.Linear(4, 2), lr=0.01, k=1.0).defaults["lr"]
        0.01
    """

    _recipe = "nekaon"


class AdaMuon(_OfRecipe):
    """`adamuon` as a class. See `as_torch_optimizer` for what it does, and `adamuon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.AdaMuon(torch.nn.Linear(4, 2), lr=0.01, momentum="int8").defaults["lr"]
        0.01
    """

    _recipe = "adamuon"


class AdaPNM(_OfRecipe):
    """`adapnm` as a class. See `as_torch_optimizer` for what it does, and `adapnm` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.AdaPNM(torch.nn.Linear(4, 2), lr=0.01, momentum="int8").defaults["lr"]
        0.01
    """

    _recipe = "adapnm"


class Prodigy(_OfRecipe):
    """`prodigy` as a class. See `as_torch_optimizer` for what it does, and `prodigy` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Prodigy(torch.nn.Linear(4, 2), lr=1.0, slice_p=11).defaults["lr"]
        1.0
    """

    _recipe = "prodigy"


class Adafactor(_OfRecipe):
    """`adafactor` as a class. See `as_torch_optimizer` for what it does, and `adafactor` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Adafactor(torch.nn.Linear(4, 2), lr=0.01).defaults["lr"]
        0.01
    """

    _recipe = "adafactor"


class KempnerMuon(_OfRecipe):
    """`kempner_muon` as a class. See `as_torch_optimizer` for what it does, and `kempner_muon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.KempnerMuon(torch.nn.Linear(4, 2), lr=0.01, adam_ratio=0.1).defaults["lr"]
        0.01
    """

    _recipe = "kempner_muon"
