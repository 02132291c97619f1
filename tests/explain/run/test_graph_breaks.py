"""Graph breaks: the user's stack and the reason."""

from __future__ import annotations

import time

import torch
import torch._dynamo
from torch import Tensor

from fusion_compile.explain._run.runtime import happened
from tests.explain.observed import observed
from tests.explain.run.lines import line_of


def broken_by_the_clock(x: Tensor) -> Tensor:
    return x * 2 + time.time()  # the clock


def test_a_break_has_the_users_stack_and_the_reason() -> None:
    def inner(x: Tensor) -> Tensor:
        return x / x.sum().item()  # the break

    def outer(x: Tensor) -> Tensor:
        return inner(x.relu()) + 1  # the call

    seen = observed(outer, (torch.rand(4),))
    (fact,) = seen.facts.graph_breaks
    assert [frame.split(": ")[0] for frame in fact.stack] == [
        line_of(__file__, "the call"),
        line_of(__file__, "the break"),
    ]
    assert fact.where == line_of(__file__, "the break") == seen.findings[0].where
    assert "CPU" in fact.reason and "item" in fact.reason
    assert seen.findings[0].op == "tensor.item()"
    assert happened(seen.facts) == {"graph_break"}


def test_one_graph_that_was_asked_for_and_refused_is_a_finding() -> None:
    whole = torch.compile(broken_by_the_clock, backend="eager", fullgraph=True)
    (finding,) = observed(whole, (torch.randn(2),)).findings
    assert (finding.kind, finding.where) == ("side_effect", line_of(__file__, "the clock"))
