"""Torch's reasons for a graph break in plain words."""

from __future__ import annotations

import pytest

from fusion_compile.explain._run.break_reasons import plain_words
from fusion_compile.explain._run.graph_breaks import break_findings, graph_break, read_break


def test_a_reason_that_no_row_knows_is_told_in_torchs_words() -> None:
    text = (
        "Graph break in user code at /home/u/model.py:7\n"
        "Graph Break Reason: Something new in torch\n"
        "  Explanation: Dynamo cannot do this yet.\n"
        "  Hint: Please report an issue to PyTorch.\n"
        "  Hint: Use that instead.\n"
        "\n  Developer debug context: call_function New()\n"
        "\n For more details about this graph break, please visit: https://example.org/gb9999.html\n"
        '\nUser code traceback:\n  File "/home/u/train.py", line 3, in <module>\n    model(x)\n'
        '  File "/home/u/model.py", line 7, in forward\n    return new(x)\n           ^^^^^^\n\nNoneType: None\n'
    )
    found = read_break(text)
    (finding,) = break_findings([found])
    assert graph_break(found).stack == ("/home/u/train.py:3: model(x)", "/home/u/model.py:7: return new(x)")
    assert (finding.kind, finding.where) == ("graph_break", "/home/u/model.py:7")
    assert finding.why.startswith("Dynamo cannot do this yet.") and finding.remedy == "Use that instead."


@pytest.mark.parametrize(
    ("what", "context", "op"),
    [
        (
            "Attempted to call function marked as skipped",
            "module: train, qualname: Lion.step, skip reason: file is force-skipped (/t/torch/optim/lr_scheduler.py)",
            "optimizer.step()",
        ),
        ("Attempted to inline function marked as skipped", "qualname: Optimizer.step, name: inner", "optimizer.step()"),
        (
            "Attempted to inline function marked as skipped",
            "qualname: Optimizer.zero_grad, name: inner, filename: `/t/torch/_compile.py`",
            "optimizer.zero_grad()",
        ),
        (
            "Attempted to inline function marked as skipped",
            "qualname: LRScheduler.step, name: step, filename: `/t/torch/optim/lr_scheduler.py`",
            "scheduler.step()",
        ),
        ("Attempted to wrap RNN, GRU, or LSTM", "GRU(4, 4)", "nn.GRU"),
        ("Failed to convert args/kwargs to proxy", "call_function args: UserDefinedObjectVariable(Generator)",
         "torch.Generator"),
        ("Attempted to wrap sparse Tensor", "", "sparse tensor"),
        (
            "Attempted to call function marked as skipped",
            "module: packaging.version, qualname: parse, skip reason: <missing reason>",
            "packaging.version.parse()",
        ),
    ],
)  # fmt: skip
def test_a_reason_is_told_by_the_row_that_fits(what: str, context: str, op: str) -> None:
    words = plain_words(what, context, "", (), ())
    assert (words.kind, words.op) == ("graph_break", op)
    assert "never traces into this function" not in words.why
    if "packaging" in context:
        assert "once, when the module is imported" in words.remedy
