"""`no_decay`: the group of parameters that weight decay leaves alone, found by the modules that hold them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_NORM_CLASS = re.compile("norm", re.IGNORECASE)


def no_decay(model: nn.Module, number: str = "weight_decay") -> dict[str, Any]:
    """Make the group of biases, norms and embeddings, which weight decay leaves alone.

    Use it as ``compile_training_step(model, loss_fn, groups=[fc.no_decay(model)])``. It looks at the model's modules
    and not at names, because a name often does not say what a parameter is: the norm of an ``nn.Sequential`` is
    ``"1.weight"``.

    The group has every trainable parameter that is an ``nn.Embedding``'s or ``nn.EmbeddingBag``'s, that belongs to a
    module whose class has ``Norm`` in its name, that is itself called ``bias`` (or ``…_bias``), or that has fewer than
    two dimensions. An output head that is tied to an embedding is that embedding.

    Args:
        model: The model that the training step is compiled for.
        number: The recipe's weight decay for these parameters. Recipes with two rates (``muon``, ``normuon``) call it
            ``"scalar_weight_decay"``.

    Returns:
        A group for `compile_training_step`, ``{"name": "no_decay", "params": [regular expressions], number: 0.0}``
        with expressions that match one full parameter name each.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> import torch.nn as nn
        >>> import fusion_compile as fc
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> fc.no_decay(model)
        {'name': 'no_decay', 'params': ['^0\\\\.bias$', '^1\\\\.weight$', '^1\\\\.bias$'], 'weight_decay': 0.0}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"no_decay() got a {type(model).__name__}; give the model, a torch.nn.Module.")
    exempt: set[int] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        table = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if table or _NORM_CLASS.search(type(module).__name__):
            exempt |= {id(p) for p in own.values()}
        exempt |= {id(p) for name, p in own.items() if name == "bias" or name.endswith("_bias") or p.ndim < 2}
    names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) in exempt]
    return {"name": "no_decay", "params": [f"^{re.escape(name)}$" for name in names], number: 0.0}
