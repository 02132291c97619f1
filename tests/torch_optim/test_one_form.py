"""A part of a bank is updated as the whole is, and shared numbers wait beside."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fusion_compile import optim
from fusion_compile._state.banks import Layout
from fusion_compile._torch_optim.one_form import NEXT, form_of, is_shared, update_of_one
from fusion_compile._torch_optim.parameter_group import ParameterGroup


def test_the_update_of_a_part_is_that_of_the_whole() -> None:
    optimizer = optim.as_torch_optimizer([nn.Parameter(torch.randn(32))], "adamw", mode="eager")
    inside = optimizer._inside
    options = optimizer.param_groups[0]
    options["params"][0].grad = torch.randn(32)
    group = inside.new_group(0, options)
    assert isinstance(group, ParameterGroup)
    (bank,) = group.layout.banks
    half = dataclasses.replace(bank, places=(bank.places[0]._replace(shape=(16,)),), length=16)
    shared = {k: t for k, t in group.state.items() if is_shared(group.layout, k, t)}
    assert {k.rpartition("/")[2] for k in shared} == {"beta1_power", "beta2_power"}
    after = {f"{NEXT}{k}": t.clone() for k, t in shared.items()}
    state = {k: t[16:] if group.layout.bank_of(k) else t for k, t in group.state.items()}
    form = form_of("half", inside.transform, "master", group, Layout((half,), group.layout.device), state)
    own = form.own(state, after)
    assert own.keys() == state.keys() | after.keys()
    gradient = options["params"][0].grad
    new = update_of_one(form.plan, False)(own, {bank.key: gradient[16:]})
    optimizer.step()
    (taken,) = optimizer._inside.groups()
    for key, tensor in new.items():
        whole = taken.state[key.removeprefix(NEXT)]
        assert torch.equal(tensor, whole[16:] if whole.ndim else whole), key
        assert key.startswith(NEXT) is (not whole.ndim)
