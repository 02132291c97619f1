"""A copy of a module whose parameters are given tensors and whose buffers are the module's own."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from fusion_compile._types import Tensors


def module_with(model: nn.Module, named: Tensors) -> nn.Module:
    """A copy of `model` that holds `named` for the parameters of these names, without a gradient.

    Buffers and parameters that are not named (frozen ones) are those of `model` itself. Tied parameters stay tied.
    Hooks and attributes are copied with it.
    """
    stands_for: dict[int, Any] = {id(b): b for b in model.buffers()}
    for name, parameter in model.named_parameters():
        own = named.get(name)
        stands_for[id(parameter)] = parameter if own is None else nn.Parameter(own, requires_grad=False)
    return copy.deepcopy(model, stands_for)


def put_parameters(made: nn.Module, model: nn.Module, named: Tensors) -> None:
    """Let `made`, a copy of `model`, hold `named` for the parameters of these names from now on, wherever it is tied.

    A parameter of its own stays the same object. One that belongs to `model`, because it was frozen, is replaced.
    """
    parameters, theirs = dict(made.named_parameters()), {id(p) for p in model.parameters()}
    replaced: dict[int, nn.Parameter] = {}
    for name, tensor in named.items():
        if id(parameters[name]) in theirs or parameters[name].dtype != tensor.dtype:
            replaced[id(parameters[name])] = nn.Parameter(tensor, requires_grad=False)
        else:
            parameters[name].data = tensor
    for module in made.modules() if replaced else ():
        for key, parameter in module._parameters.items():
            module._parameters[key] = replaced.get(id(parameter), parameter)


def share_the_rest(made: nn.Module, model: nn.Module, own: Collection[str]) -> None:
    """Let the copy `made` show the buffers that `model` has now, and its parameters except those called `own`.

    ``model.to(device)`` makes other buffers than those that were there when `made` was copied.
    """
    theirs = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in made.named_modules(remove_duplicate=False):
        if (source := theirs.get(prefix)) is None:
            continue
        for key in module._buffers:
            if key in source._buffers:
                module._buffers[key] = source._buffers[key]
        for key in module._parameters:
            if (f"{prefix}.{key}" if prefix else key) not in own and source._parameters.get(key) is not None:
                module._parameters[key] = source._parameters[key]
