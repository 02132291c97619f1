"""A copy of a module with other parameters: tied ones stay tied, what is not named is the module's own."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile._state.average_model import module_with


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)


def test_named_parameters_are_given_and_the_rest_is_the_models_own() -> None:
    model = Tied()
    named = {"embed.weight": torch.zeros(5, 4), "norm.weight": torch.ones(4)}
    made = module_with(model, named)
    assert isinstance(made, Tied) and made is not model
    assert made.head.weight is made.embed.weight and made.embed.weight.data_ptr() == named["embed.weight"].data_ptr()
    assert not any(p.requires_grad for p in made.parameters())
    assert made.norm.bias is model.norm.bias and made.norm.running_mean is model.norm.running_mean
    assert model.embed.weight.requires_grad and not torch.equal(model.embed.weight, made.embed.weight)
