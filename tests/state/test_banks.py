"""Banks: what shares one, how it is called, and the way from names to banks and back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fusion_compile._state.banks import build_layout
from fusion_compile._state.routing import route

BOTH = ("spectral", "scalar")


def model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(128, 256), "b": nn.Linear(128, 256), "c": nn.Linear(2, 2)})


def test_one_bank_for_each_role_shape_and_group() -> None:
    net = model()
    routes = [replace(r, group="apart") if r.name.startswith("b") else r for r in route(net, BOTH)]
    layout = build_layout(net, routes)
    assert {b.key: [p.name for p in b.places] for b in layout.banks} == {
        "spectral/256x128/float32": ["a.weight"],
        "scalar/float32": ["a.bias", "c.weight", "c.bias"],
        "spectral/256x128/float32@apart": ["b.weight"],
        "scalar/float32@apart": ["b.bias"],
    }


def test_a_path_leads_to_its_own_groups_bank() -> None:
    net = model()
    routes = [replace(r, group="apart") if r.name.startswith("b") else r for r in route(net, BOTH)]
    layout = build_layout(net, routes)
    assert layout.bank_of("optimizer/0/mu/scalar/float32@apart") == "scalar/float32@apart"
    assert layout.bank_of("optimizer/0/mu/scalar/float32") == "scalar/float32"
    assert layout.bank_of("optimizer/0/mu/scalar/bfloat16") is None
    assert layout.bank_of("optimizer/0/beta1_power") is None


def test_names_to_banks_and_back_and_without_data() -> None:
    net = model()
    layout = build_layout(net, route(net, BOTH))
    named = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    banks = layout.join(named)
    assert all(torch.equal(v, named[n]) for n, v in layout.views(banks).items())
    empty = layout.without_data()
    assert {k: (t.shape, t.dtype, t.device.type) for k, t in empty.items()} == {
        k: (t.shape, torch.float32, "meta") for k, t in banks.items()
    }
    assert {n: v.shape for n, v in layout.by_name("scalar/float32", banks["scalar/float32"])} == {
        "a.bias": (256,),
        "b.bias": (256,),
        "c.weight": (2, 2),
        "c.bias": (2,),
    }
