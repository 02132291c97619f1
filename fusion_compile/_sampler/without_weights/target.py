"""Build the model that a command names, with new weights, and the arguments of one call of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fusion_compile._factory import Made, call_factory, described
from fusion_compile._sampler.without_weights.diffusers_arguments import CallSizes
from fusion_compile._sampler.without_weights.diffusers_calls import example_call, model_of_config
from fusion_compile.passes._compat import tree_map

Built: TypeAlias = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model and the arguments of one call of it."""


def build_target(target: str, dtype: torch.dtype | None = None, sizes: CallSizes | None = None) -> Built:
    """Build the model of `target` with new weights on the current default device.

    `target`: a diffusers config.json, a folder with one, or ``module:factory``. `dtype`: of the weights and of the
    arguments; None is bfloat16 for a config, and for a factory the dtype that it gives. Modules that a class keeps in
    float32 stay so. `sizes`: of a config's call. Raises ValueError if the model cannot be found or built.
    """
    if ":" not in target or Path(target).exists():
        return with_example(model_of_config(target), dtype or torch.bfloat16, sizes)
    model, args, kwargs, _ = _call_factory(target)  # it counts one call; further ones are for explain
    if dtype is not None:
        cast_weights(model, dtype)
        args, kwargs = tree_map(lambda leaf: _in_dtype(leaf, dtype), (args, kwargs))
    return (model, args, kwargs) if args or kwargs else with_example(model, dtype, sizes)


def with_example(model: nn.Module, dtype: torch.dtype | None, sizes: CallSizes | None) -> Built:
    """A transformer of diffusers in `dtype`, and the arguments of one call of it."""
    if dtype is not None:
        cast_weights(model, dtype)
    return model, (), example_call(model, 1, sizes).arguments


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the state dict to `dtype`, as loading a checkpoint does, except modules that the class keeps in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or not kept.isdisjoint(name.split(".")):
            continue
        if isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.to(dtype)
        else:  # it may be a view of a tensor that keeps its dtype
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, tensor.to(dtype))


def _call_factory(target: str) -> Made:
    made = call_factory(target)
    if not isinstance(made.obj, nn.Module):
        raise ValueError(
            f"{target} returned {described(made.obj)}; it must return (model, args) or (model, args, kwargs), a "
            f"torch.nn.Module, a tuple and a dict."
        )
    return made


def _in_dtype(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
