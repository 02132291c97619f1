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


class Nekaon(_OfRecipe):
    """`nekaon` as a class. See `as_torch_optimizer` for what it does, and `nekaon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Nekaon(torch.nn.Linear(4, 2), lr=0.01, k=1.0).defaults["lr"]
        0.01
    """


class AdaMuon(_OfRecipe):
    """`adamuon` as a class. See `as_torch_optimizer` for what it does, and `adamuon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.AdaMuon(torch.nn.Linear(4, 2), lr=0.01, momentum="int8").defaults["lr"]
        0.01
    """


class AdaPNM(_OfRecipe):
    """`adapnm` as a class. See `as_torch_optimizer` for what it does, and `adapnm` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.AdaPNM(torch.nn.Linear(4, 2), lr=0.01, momentum="int8").defaults["lr"]
        0.01
    """


class Prodigy(_OfRecipe):
    """`prodigy` as a class. See `as_torch_optimizer` for what it does, and `prodigy` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Prodigy(torch.nn.Linear(4, 2), lr=1.0, slice_p=11).defaults["lr"]
        1.0
    """


class Adafactor(_OfRecipe):
    """`adafactor` as a class. See `as_torch_optimizer` for what it does, and `adafactor` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Adafactor(torch.nn.Linear(4, 2), lr=0.01).defaults["lr"]
        0.01
    """


class KempnerMuon(_OfRecipe):
    """`kempner_muon` as a class. See `as_torch_optimizer` for what it does, and `kempner_muon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.KempnerMuon(torch.nn.Linear(4, 2), lr=0.01, adam_ratio=0.1).defaults["lr"]
        0.01
    """


class ADOPT(_OfRecipe):
    """`adopt` as a class. See `as_torch_optimizer` for what it does, and `adopt` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.ADOPT(torch.nn.Linear(4, 2), lr=0.01).defaults["lr"]
        0.01
    """


class AdaBelief(_OfRecipe):
    """`adabelief` as a class. See `as_torch_optimizer` for what it does, and `adabelief` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.AdaBelief(torch.nn.Linear(4, 2), lr=0.01).defaults["lr"]
        0.01
    """


class AdamP(_OfRecipe):
    """`adamp` as a class. See `as_torch_optimizer` for what it does, and `adamp` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.AdamP(torch.nn.Linear(4, 2), lr=0.01, weight_decay=0.1).defaults["lr"]
        0.01
    """


class Autokaon(_OfRecipe):
    """`autokaon` as a class. See `as_torch_optimizer` for what it does, and `autokaon` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Autokaon(torch.nn.Linear(4, 2), lr=1.0, freeze=500).defaults["lr"]
        1.0
    """


class AdaMuonSign(_OfRecipe):
    """`adamuon_sign` as a class. See `as_torch_optimizer` for what it does, and `adamuon_sign` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(3)))
        >>> fc.optim.AdaMuonSign(model, lr=0.01).defaults["lr"]
        0.01
    """


class KempnerSFAdamW(_OfRecipe):
    """`kempner_sf_adamw` as a class. See `as_torch_optimizer` for what it does, and `kempner_sf_adamw` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.KempnerSFAdamW(torch.nn.Linear(4, 2), lr=0.01).defaults["lr"]
        0.01
    """


class Fusion(_OfRecipe):
    """`fusion` as a class. See `as_torch_optimizer` for what it does, and `fusion` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.Fusion(torch.nn.Linear(4, 2), lr=0.01, components=("ns5", "sf")).defaults["lr"]
        0.01
    """


class FusionOptCompat(_OfRecipe):
    """`fusionopt_compat` as a class. See `as_torch_optimizer` for what it does, and `fusionopt_compat` for its options.

    Example:
        >>> import torch, fusion_compile as fc
        >>> fc.optim.FusionOptCompat(torch.nn.Linear(4, 2), lr=0.01).defaults["lr"]
        0.01
    """
