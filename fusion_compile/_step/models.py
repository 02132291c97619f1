"""Models that a step refuses whatever the loss does, because something else runs or owns their gradients."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile import _compat


def refuse_other_kinds(model: object, loss_fn: object) -> None:
    """Raise TypeError unless they are a module and a callable."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; compile_training_step needs a torch.nn.Module.")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}; it must be callable as loss_fn(model, *batch).")


def refuse_model(model: nn.Module, *, over_ranks: bool = False) -> None:
    """Raise ValueError for a wrapper that averages gradients, a scripted module, or a run of several processes.

    A step computes gradients by ``torch.autograd.grad``. What other processes or hooks on ``.grad`` add to them never
    happens there, and the ranks would drift apart without a word. `over_ranks`: whether the step was given a mesh.
    """
    for name, module in model.named_modules():
        where = f"the model's {name}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{where} is a scripted module (torch.jit), whose parameters cannot be exchanged; give the module that "
                f"it was scripted from."
            )
        if isinstance(module, _compat.gradient_averaging_modules()):
            raise ValueError(
                f"{where} is wrapped in {type(module).__name__}, whose hooks average gradients, and a step does not "
                f"run them; give the module inside ({name + '.' if name else 'model.'}module), and mesh=, with which "
                f"a step averages them itself."
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"{where} is a {type(module).__name__} with sparse=True, and every recipe takes dense gradients; set "
                f"{name + '.' if name else 'model.'}sparse = False."
            )
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"{name} has no shape yet, because it belongs to a lazy module; call the model once on a batch before "
                f"compile_training_step()."
            )
        if _compat.is_spread_over_devices(parameter):
            raise ValueError(
                f"{name} {list(parameter.shape)} is a DTensor, spread over several devices, and a step wants "
                f"whole parameters. Give the model before fully_shard() or parallelize_module(), and mesh=, with which "
                f"a step divides the optimizer's state itself; or keep a loop of your own with as_torch_optimizer()."
            )
    if not over_ranks and (sentence := several_ranks()):
        raise ValueError(sentence)


def several_ranks() -> str:
    """Why a step refuses to run in a process group of several ranks; empty where there is none. Half a microsecond."""
    if (ranks := _compat.ranks()) <= 1:
        return ""
    return (
        f"torch.distributed runs with {ranks} ranks, and without mesh= a step does not average gradients over them: "
        f"each rank would train a model of its own. Give mesh=torch.distributed.device_mesh.init_device_mesh(device, "
        f"({ranks},)), or call torch.distributed.destroy_process_group() before the step if the ranks are meant to be "
        f"independent."
    )
