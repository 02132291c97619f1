"""Targets of the command: a model with new weights and a call of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion_compile._sampler.without_weights.target import build_target, cast_weights


class KeepsFloat32(nn.Module):
    _keep_in_fp32_modules = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


def factory() -> tuple[nn.Module, list[Tensor]]:
    return nn.Linear(4, 4), [torch.ones(2, 4), torch.tensor([1, 2])]


def test_floating_weights_are_cast_except_those_the_class_keeps() -> None:
    model = KeepsFloat32()
    cast_weights(model, torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kinds["out.weight"] is torch.bfloat16 and kinds["norm.weight"] is torch.float32
    assert kinds["count"] is torch.int64


def test_a_factory_gives_the_model_and_its_arguments_which_are_cast_too() -> None:
    model, args, kwargs = build_target(f"{__name__}:factory", torch.bfloat16)
    assert next(model.parameters()).dtype is torch.bfloat16 and kwargs == {}
    assert [a.dtype for a in args] == [torch.bfloat16, torch.int64]
