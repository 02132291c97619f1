"""A group's entries of an average are shown in the average's model under the model's own names."""

from __future__ import annotations

import torch
from torch import nn

import fusion_compile as fc
from fusion_compile._state.routing import route
from fusion_compile._torch_optim.averages import bind_averages
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile.optim import adamw, averaged


def test_names_of_the_group_may_be_others_than_the_models() -> None:
    model = nn.Linear(3, 2)
    ema = fc.EMA(model, 0.9)
    ema.wait_for(model)
    members = {"first": model.get_parameter("weight"), "second": model.get_parameter("bias")}
    routes = route(nn.ParameterDict(members), ("scalar",))
    transform = averaged(adamw(1e-3), [ema.average])
    group = ParameterGroup(0, members, routes, transform, {}, averages=[ema.average])
    bind_averages([ema], group)
    assert torch.equal(ema.model.get_parameter("weight"), model.weight)
    for key in group.averaged:
        group.state[key].zero_()
    assert not any(p.any() for p in ema.model.parameters()) and ema.names == {"weight", "bias"}
