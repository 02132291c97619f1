"""Rows: released models at tiny size, those that generate tokens and those that denoise."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile.passes._compat import tree_leaves
from tests.models.cases import case
from tests.models.released import DROPOUT, READS_THE_HOST, RELEASED
from tests.real_programs.program import Program, Sampling, Training

STEPS = 3
DENOISERS = ("examples/dit.py", "published DiT, guided", "published SiT", "DiT", "SD3", "Flux", "Wan", "Qwen-Image")
TRAINED = (
    *("GPT-2", "Llama, checkpointed", "T5", "BERT", "ViT", "Mamba", "Mixtral", "UNet", "Flux with LoRA"),
    *("4-bit base with LoRA", "int8 base with LoRA", "LSTM"),
)
LAYER_DROP_OFF = "Whisper, its layer-drop as published"


def _released(name: str) -> Training:
    model, loss_fn, batches = (RELEASED | READS_THE_HOST)[name](DROPOUT)
    return Training(model, loss_fn, list(batches[:STEPS]))


def _never_dropped() -> Training:
    """Its configuration's own default is a probability of 0."""
    training = _released("Whisper")
    for module in training.model.modules():
        if hasattr(module, "layerdrop"):
            setattr(module, "layerdrop", 0.0)  # noqa: B010  # a Module's attribute is a Tensor to a type checker
    return training


def _away_from(goal: float, output: Any) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.stack([(leaf.float() - goal).square().mean() for leaf in leaves]).sum()


def _trained(name: str) -> Training:
    """The call's tensors are the batch; its sizes and switches are part of the loss."""
    c = case(name)
    torch.manual_seed(2)  # a case that is made anew draws numbers
    model = copy.deepcopy(c.model).train()
    calls = [c.at(c.call(), i) for i in range(STEPS)]
    fixed = {n: v for n, v in calls[0].items() if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(v))}

    def loss_fn(model: nn.Module, given: dict[str, Any]) -> Tensor:
        return _away_from(0.3, model(**given, **fixed))

    return Training(model, loss_fn, [({n: v for n, v in call.items() if n not in fixed},) for call in calls])


def _sampled(name: str) -> Sampling:
    c = case(name)
    torch.manual_seed(2)
    calls = [c.at(request, i) for request in (c.call(), c.call()) for i in range(STEPS)]
    return Sampling(copy.deepcopy(c.model), calls)


PROGRAMS: dict[str, Program] = {
    **{name: Program(lambda name=name: _released(name)) for name in (*TRAINED, *READS_THE_HOST)},  # type: ignore[misc]
    LAYER_DROP_OFF: Program(_never_dropped),
    **{
        name: Program(lambda name=name: _trained(name), lambda name=name: _sampled(name))  # type: ignore[misc]
        for name in DENOISERS
    },
}
