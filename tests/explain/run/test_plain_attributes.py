"""Tensors that modules hold as plain attributes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.explain._run.captured import capture
from fusion_compile.explain._run.plain_attributes import PlainAttributes


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("buffer", torch.zeros(2))
        self.plain = torch.zeros(2)
        self.by_layer = {"first": [torch.zeros(2)]}

    def forward(self, x: Tensor) -> Tensor:
        self.plain = self.plain + x
        self.by_layer["first"][0].add_(x)
        return self.plain + self.by_layer["first"][0]


def test_only_what_is_no_parameter_and_no_buffer_is_a_plain_attribute() -> None:
    model = nn.Sequential(Keeps())
    inside = model[0]
    assert isinstance(inside, Keeps)
    held = PlainAttributes([model]).tensors
    assert [id(t) for t in held] == [id(inside.plain), id(inside.by_layer["first"][0])]


def test_each_change_is_a_finding_and_everything_is_put_back() -> None:
    model, x = Keeps(), torch.ones(2)
    plain, listed = model.plain, model.by_layer["first"][0]
    attributes = PlainAttributes([model])
    capture(model, (x,), {}, attributes)
    assert [(f.op, f.severity) for f in attributes.findings()] == [
        ("plain", "error"),
        ("by_layer['first'][0]", "warning"),
    ]
    assert model.plain is plain and model.by_layer["first"][0] is listed
    assert plain.tolist() == listed.tolist() == [0, 0]


def test_explaining_twice_says_the_same_and_a_mark_of_the_users_is_respected() -> None:
    model, x = Keeps(), torch.ones(2)
    first, second = (fc.explain(model, (x,), run=False).findings for _ in range(2))
    assert first == second and len(first) == 2
    torch._dynamo.mark_static_address(model.by_layer["first"][0], guard=False)
    assert [f.op for f in fc.explain(model, (x,), run=False).findings] == ["plain"]


def test_a_cache_that_is_filled_once_is_no_finding() -> None:
    class Lazy(nn.Module):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = x.new_ones(2)
            return x * self.table

    assert fc.explain(Lazy(), (torch.ones(2),), run=False).findings == ()
