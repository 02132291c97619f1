"""Guards and recompiles of a program."""

from __future__ import annotations

import json
import random

import torch
import torch._dynamo
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.explain._run.compilations import read_compilations
from fusion_compile.explain._run.listen import TraceRecord
from fusion_compile.explain._run.recompiles import read_failures, recompile_findings
from fusion_compile.explain._run.runtime import happened
from tests.explain.observed import observed
from tests.explain.run.lines import line_of


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


def test_of_several_values_that_changed_each_is_told_and_the_same_change_once() -> None:
    def loss(images: Tensor, labels: Tensor, rate: float, shift: int) -> Tensor:
        return images.sum() * rate + labels.roll(shift).sum()  # the loss

    first, second = (torch.randn(8, 4), torch.randn(8), 0.5, 1), (torch.randn(6, 5), torch.randn(6), 0.25, 2)
    found = observed(loss, first, calls=[second]).findings
    assert {(f.kind, f.op) for f in found} == {
        ("dynamic_shape", "images.shape[0], labels.shape[0]"),
        ("dynamic_shape", "images.shape[1]"),
        ("python_scalar", "rate"),
        ("python_scalar", "shift"),
    }
    assert {f.where for f in found} == {line_of(__file__, "the loss")}
    assert any("dimension 0 of images and dimension 0 of labels changed (from 8 to 6)" in f.why for f in found)


def test_sizes_that_change_one_after_the_other_are_each_told() -> None:
    def total(x: Tensor) -> Tensor:
        return x.sum(0)

    found = observed(total, (torch.randn(8, 4),), calls=[(torch.randn(6, 4),), (torch.randn(6, 7),)]).findings
    assert [f.op for f in found] == ["x.shape[0]", "x.shape[1]"]


def test_of_torchs_own_modules_the_argument_is_named_and_no_line_of_torchs() -> None:
    stacked = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    (finding,) = observed(stacked, (torch.randn(3, 4),), calls=[(torch.randn(5, 4),)]).findings
    assert (finding.op, finding.where) == ("input.shape[0]", "")


def test_the_number_of_an_optimizers_state_is_told_as_the_method_names_it() -> None:
    metrics = {"co_name": "inner", "co_filename": __file__, "co_firstlineno": 1}
    compilations = read_compilations([TraceRecord("compilation_metrics", "0/0", metrics, "")])
    said = "0/0: L['opt'].state[list(dict.keys(L['opt'].state))[0]]['step'] == 1"
    failures = read_failures([TraceRecord("recompile_reasons", "0/1", {}, said)], compilations, of_these_only=True)
    (finding,) = recompile_findings(failures)
    assert (finding.kind, finding.op) == ("python_scalar", "opt.state[…]['step']")


def test_the_learning_rate_of_torchs_optimizer_is_told_where_the_user_calls_its_step() -> None:
    """Dynamo compiles the step of torch's optimizers by itself, where ``self`` and every line are torch's."""
    model = nn.Linear(4, 2)
    model(torch.randn(3, 4)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def update(x: Tensor) -> Tensor:
        y = x * 2
        optimizer.step()  # the step
        return y

    def decay() -> None:
        optimizer.param_groups[0]["lr"] *= 0.5

    x = torch.randn(3)
    found = fc.explain(update, (x,), calls=[(x,), decay, (x,), decay, (x,)], backend="eager").findings
    (rate,) = [each for each in found if each.kind == "python_scalar"]
    assert (rate.op, rate.where) == ("optimizer.param_groups[0]['lr']", line_of(__file__, "the step"))
    assert "from 0.001" in rate.why or "was 0.001" in rate.why
    (broken,) = [each for each in found if each.kind == "graph_break"]
    assert broken.op == "optimizer.step()"


def test_what_only_follows_from_a_break_is_an_event_and_no_finding() -> None:
    def jitter(x: Tensor) -> Tensor:
        return x * random.random()  # the break

    seen = observed(jitter, (torch.ones(2),), calls=[(torch.ones(2),)])
    assert [(f.kind, f.where) for f in seen.findings] == [("side_effect", line_of(__file__, "the break"))]
    assert len(seen.facts.recompiles) == 1
