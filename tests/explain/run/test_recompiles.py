"""Guards and recompiles of a program."""

from __future__ import annotations

import json

import torch
import torch._dynamo
from torch import Tensor, nn

from fusion_compile.explain._run.listen import TraceRecord
from fusion_compile.explain._run.recompiles import read_compilations, read_failures, read_guards
from fusion_compile.explain._run.runtime import happened
from tests.explain.observed import observed
from tests.explain.run.lines import line_of


def test_guards_have_the_users_names_and_lines() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.scale  # the use

    module = Scaled()
    seen = observed(module, (torch.randn(4),))
    guards = {guard.text: guard.where for guard in seen.facts.guards}
    assert any("torch.float32" in text and "size=[4]" in text for text in guards)
    assert any(text.endswith(".scale == 2.0") for text in guards)
    assert set(guards.values()) == {line_of(__file__, "the use")}


def test_the_first_guard_that_failed_is_told_with_its_line() -> None:
    def scaled(x: Tensor, factor: float) -> Tensor:
        return x * factor  # the factor

    x = torch.randn(4)
    seen = observed(scaled, (x, 1.0), calls=[(x, 2.0), (x, 3.0)])
    (again,) = seen.facts.recompiles  # the second time torch takes any number
    assert (again.function, again.guard, again.where) == ("scaled", "factor == 1.0", line_of(__file__, "the factor"))
    assert again.compile_id.endswith("/1")
    assert happened(seen.facts) == {"recompile"}


def test_what_is_compiled_too_often_is_said_to_run_uncompiled() -> None:
    seen_before: list[Tensor] = []

    def remembers(x: Tensor) -> Tensor:  # the definition
        seen_before.append(x)
        return torch.stack(seen_before).sum()

    x = torch.randn(2)
    with torch._dynamo.config.patch(recompile_limit=2):
        cause, consequence = observed(remembers, (x,), calls=[(x,)] * 3).findings
    assert (cause.kind, cause.op) == ("growing_state", "seen_before")
    assert (consequence.kind, consequence.where) == ("recompile", line_of(__file__, "the definition"))
    assert "2 times" in consequence.why and "uncompiled" in consequence.why


def test_a_guard_tree_of_torch_211_is_read() -> None:
    text = (
        "| +- GuardManager: source=L['d'], accessed_by=FrameLocalsGuardAccessor(key='d', framelocals_idx=0), "
        "type=<class 'dict'>, tag_safe=(False, False)\n"
        "| | +- EQUALS_MATCH: L['d']['n'] == 3                     # x * d['n']  # src/model.py:4 in forward\n"
        "| | +- GLOBAL_STATE: ___check_global_state() against {}   # x * d['n']  # src/model.py:4 in forward\n"
    )
    guards, types = read_guards(text, {"/home/u/src/model.py"})
    assert [(g.text, g.where) for g in guards] == [("d['n'] == 3", "/home/u/src/model.py:4")]
    assert types == {"d": "dict"}


def test_a_recompile_is_read_with_and_without_a_stack_and_not_if_it_is_of_another_program() -> None:
    metrics = {"co_name": "forward", "co_filename": "/home/u/src/model.py", "co_firstlineno": 3}
    compilations = read_compilations([TraceRecord("compilation_metrics", "0/0", metrics, "")])
    commented = "0/0: L['lr'] == 0.1                    # x * lr  # src/model.py:4 in forward"
    with_stack = '0/0: lr == 0.1\nUser stack trace:\n  File "/home/u/src/model.py", line 5, in forward\n    x * lr'
    without = "0/0: tensor 'L['x']' size mismatch at index 0. expected 4, actual 5"
    other = "7/0: lr == 0.1"
    payloads = [json.dumps([commented, other]), with_stack, without, other]
    records = [TraceRecord("recompile_reasons", f"0/{i}", {}, text) for i, text in enumerate(payloads, 1)]
    found = read_failures(records, compilations, of_these_only=True)
    assert [(f.text, f.where, f.compile_id) for f in found] == [
        ("lr == 0.1", "/home/u/src/model.py:4", "0/1"),
        ("lr == 0.1", "/home/u/src/model.py:5", "0/2"),
        ("tensor 'x' size mismatch at index 0. expected 4, actual 5", "/home/u/src/model.py:3", "0/3"),
    ]
    assert len(read_failures(records, compilations, of_these_only=False)) == 4
