"""Refuse models whose weights or hooks a sampler's graph cannot represent, before any work is done."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_PLAIN = (Tensor, nn.Parameter)


class Unservable(ValueError):
    """A sampler's graph cannot represent the model as it is now. The model itself can be called.

    `of_the_call`: whether this is so for calls of one form only, whatever becomes of hooks and weights.
    """

    of_the_call = False


def refuse_unservable(model: nn.Module) -> None:
    """Raise `Unservable` that names a weight or a module which cannot be served.

    Refused are weights without data, weights of another tensor class (DTensor of FSDP and tensor parallelism, the
    quantised ones of TorchAO, bitsandbytes and GGUF), a wrapper that averages gradients, and modules with a hook that
    moves weights or keeps state between calls (accelerate's offloading, diffusers' HookRegistry).
    """
    for name, tensor in _weights(model):
        if type(tensor) not in _PLAIN:
            raise Unservable(
                f"{name} {list(tensor.shape)} is a {type(tensor).__name__}; a sampler's graph reads plain tensors. "
                f"Build the sampler from the unsharded, dequantised model."
            )
        if tensor.is_meta:
            raise Unservable(
                f"{name} {list(tensor.shape)} is on the meta device and has no data; load the weights first, or use "
                f"`fusion-compile explain-sampler` for a report without weights."
            )
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if isinstance(module, DistributedDataParallel):
            inside = ".".join(filter(None, ("model", name, "module")))
            raise Unservable(
                f"{name or 'the model'} is wrapped in DistributedDataParallel, which averages gradients; torch.export "
                f"cannot write it down. Build the sampler from the module inside, {inside}."
            )
        if getattr(module, "_hf_hook", None) is not None:
            raise Unservable(
                f"{where} has accelerate's {type(module._hf_hook).__name__}, which moves weights at every call; "
                f"the graph would keep the moment of its export. Call "
                f"accelerate.hooks.remove_hook_from_module(model, recurse=True) first; release_weights(to='cpu') "
                f"gives memory back instead."
            )
        if hooks := list(getattr(getattr(module, "_diffusers_hook", None), "hooks", ())):
            raise Unservable(
                f"{where} has diffusers' hook {hooks[0]!r}, which runs at every call (caching, group offloading, "
                f"layerwise casting); the graph would keep the moment of its export. Disable it first "
                f"(model.disable_cache(), or build the sampler before enabling it)."
            )


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
