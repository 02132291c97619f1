"""What a sampler refuses before any work: weights that are no plain tensors, hooks that a graph cannot hold."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dit import DiT
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from fusion_compile.sampler import optimize_sampler
from tests.models.tiny import tiny_model


def model() -> DiT:
    return DiT(hidden_size=16, depth=1, num_heads=2).eval()


class Quantised(Tensor):
    """Stands for TorchAO's, bitsandbytes' and DTensor: a tensor class that wraps another."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Quantised:
        made: Any = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # torch declares it without cls
        def unwrap(a: object) -> object:
            return a.inner if isinstance(a, cls) else a

        out = func(*map(unwrap, args), **(kwargs or {}))
        return return_and_correct_aliasing(func, args, kwargs or {}, cls(out) if isinstance(out, Tensor) else out)


def test_a_wrapper_that_averages_gradients_is_named_with_what_to_give(tmp_path: Path) -> None:
    """torch.export said "Non-recursive torch.compiler.disable is not supported"."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model()).eval()
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel.*the module inside, model\.module"):
            optimize_sampler(wrapped, 4)
        optimize_sampler(wrapped.module, 4)
    finally:
        dist.destroy_process_group()


def test_a_quantised_weight_is_named() -> None:
    dit = model()
    layer: Any = dit.get_submodule("blocks.0.mlp.0")
    weight = layer.weight
    layer.weight = nn.Parameter(Quantised(weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.0\.weight \[64, 16\] is a Quantised"):
        optimize_sampler(dit, 4)


def test_weights_without_data_are_refused() -> None:
    with torch.device("meta"):
        dit = model()
    with pytest.raises(ValueError, match="is on the meta device and has no data"):
        optimize_sampler(dit, 4)


def test_offloading_by_accelerate_is_refused() -> None:
    from accelerate import hooks

    dit = model()
    hooks.add_hook_to_module(dit.blocks[0], hooks.AlignDevicesHook(io_same_device=True))
    with pytest.raises(ValueError, match=r"blocks\.0 has accelerate's AlignDevicesHook"):
        optimize_sampler(dit, 4)
    hooks.remove_hook_from_module(dit, recurse=True)
    optimize_sampler(dit, 4)


def test_a_caching_hook_of_diffusers_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    flux: Any = tiny_model("Flux").eval()
    untouched = copy.deepcopy(flux)
    flux.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="has diffusers' hook"):
        optimize_sampler(flux, 4)
    optimize_sampler(untouched, 4)
