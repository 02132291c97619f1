"""Compiling and running a program, and the record of it."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from fusion_compile.explain import _compat
from tests.explain.observed import observed, torchs_state
from tests.explain.run.lines import line_of


def broken_by_the_clock(x: Tensor) -> Tensor:
    return x * 2 + time.time()  # the clock


def fails(x: Tensor) -> Tensor:
    return torch.cat([x, x[None]])


def test_everything_of_torchs_is_as_before_also_after_an_error() -> None:
    _compat.import_inductor()
    torch.compile(torch.sin, backend="eager")(torch.randn(2))  # the first takes a handler of torch's away
    before = torchs_state()
    observed(broken_by_the_clock, (torch.randn(2),))
    assert torchs_state(before) == before
    with pytest.raises(Exception, match="dimensions of tensors must match"):
        observed(fails, (torch.randn(2),))
    assert torchs_state(before) == before


def test_what_was_compiled_before_is_seen_again_and_others_stay_compiled() -> None:
    def one(x: Tensor) -> Tensor:
        return x * 2 + time.time()

    def other(x: Tensor) -> Tensor:
        return x.sin()

    x = torch.randn(4)
    compiled, bystander = torch.compile(one, backend="eager"), torch.compile(other, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's, of time.time
        compiled(x)
    bystander(x)
    for seen in (observed(compiled, (x,)), observed(compiled, (x,)), observed(one, (x,))):
        assert [f.kind for f in seen.findings] == ["side_effect"]
    with torch.compiler.set_stance("fail_on_recompile"):
        bystander(x)


def test_a_shape_that_changed_before_counts_as_new() -> None:
    """Dynamo remembers which sizes of a function varied, also when its code is compiled again."""

    def total(x: Tensor) -> Tensor:
        return x.sum(0)

    for _ in range(2):
        seen = observed(total, (torch.randn(4, 3),), calls=[(torch.randn(5, 3),)])
        assert [f.kind for f in seen.findings] == ["dynamic_shape"]


def test_a_program_without_tensors_says_that_nothing_was_compiled() -> None:
    seen = observed(lambda: None, backend=None)
    assert seen.findings == () and "nothing was compiled" in seen.notes[0]


def test_modules_are_observed_with_their_hooks_and_so_are_torchs_own_and_methods() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    def reads(module: nn.Module, args: Any, output: Tensor) -> None:
        output.sum().item()  # the hook

    class Called:
        def __call__(self, x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(4, 4)
    hooked = Doubles()
    hooked.register_forward_hook(reads)
    (finding,) = observed(hooked, (x,)).findings
    assert (finding.kind, finding.where) == ("host_sync", line_of(__file__, "the hook"))
    stacked = nn.Sequential(nn.Linear(4, 4), Doubles())
    for clean in (Doubles(), Doubles().forward, nn.Linear(4, 4), stacked, Called(), functools.partial(Called())):
        seen = observed(clean, (x,))
        assert seen.findings == () and seen.notes == () and seen.facts.phases


def test_kernels_refusals_phases_and_caches_of_a_compiled_program() -> None:
    def program(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ w).relu()  # the product
        return y.softmax(-1) * 2, x.sum(0)  # the softmax

    inputs = torch.randn(8, 16), torch.randn(16, 16)
    seen = observed(program, inputs, backend="inductor")
    facts = seen.facts
    library, generated = facts.kernels
    assert library.nodes == ("mm",) and library.where == (line_of(__file__, "the product"),)
    assert {"relu", "exp", "div"} <= set(generated.nodes)
    assert set(generated.where) == {line_of(__file__, "the product"), line_of(__file__, "the softmax")}
    assert generated.source.startswith(f"{generated.name} = ") and "kernel(" in generated.source
    assert facts.fusion_refusals and all(r.reason for r in facts.fusion_refusals)
    assert {name for r in facts.fusion_refusals for name in r.first.split(", ")} <= {
        "exp",
        "sub",
        "relu",
        "sum_1",
        "amax",
    }
    assert [phase.name.split(":")[0] for phase in facts.phases] == ["Dynamo", "AOTAutograd", "Inductor", "Code"]
    assert all(phase.seconds > 0 for phase in facts.phases)
    assert facts.cache.hits == 0  # the caches were left aside
    assert seen.findings == () and seen.notes == ()

    torch.compiler.reset()
    observed(program, inputs, backend="inductor", fresh=False)
    torch.compiler.reset()
    warm = observed(program, inputs, backend="inductor", fresh=False).facts
    assert warm.cache.hits > 0
    assert [k.name for k in warm.kernels] == [k.name for k in facts.kernels]
