"""The meaning of torch's reasons for a graph break, and the remedies: a table by torch's own names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from fusion_compile.passes._user_frame import TORCH


class Words(NamedTuple):
    """What a finding about a break says."""

    kind: str
    op: str
    why: str
    remedy: str


class _Row(NamedTuple):
    """A rule for breaks.

    `what`, `context`: patterns of torch's name for the break and of its debug context.
    `op`: how to write the operator, with ``{name}`` for its name in the context; empty for torch's name of the break.
    """

    what: str
    context: str
    kind: str
    op: str
    why: str
    remedy: str


_OPTIMIZERS = os.path.join(TORCH, "optim", "")
_OPTIMIZER = re.compile(r"qualname: (?!\w*(LR|Scheduler)\.)(Optimizer\.|[\w.<>]+\.step\b.*\btorch[/\\]optim\b)")
"""A scheduler wraps its optimizer's step, also that of a user's optimizer, which then counts as torch's file."""
_TENSOR_READ = "Keep the value as a tensor: torch.where instead of if, a 0-dim tensor instead of a number."

_ROWS = (
    _Row(
        r"Tensor\.(item|tolist|numpy)\(\)|Unsupported Tensor\.(item|tolist)|Data dependent operator",
        r"",
        "host_sync",
        "{name}",
        "It copies a value to the CPU, which first waits until the device has finished all work before it.",
        _TENSOR_READ,
    ),
    _Row(
        r"Data-dependent (branching|assertion)|symbolic_shapes.guard_scalar",
        r"",
        "host_sync",
        "if",
        "A Python branch depends on a tensor's value, so the CPU waits for the value.",
        "Compute both branches and choose with torch.where.",
    ),
    _Row(
        r"Dynamic shape operator|Dynamic slicing with Tensor",
        r"",
        "host_sync",
        "{name}",
        "The shape of its result depends on the data, so the CPU waits for the size.",
        "Use torch.where or multiply by the mask; both keep the shape.",
    ),
    _Row(
        r"optimizer",
        r"",
        "graph_break",
        "optimizer.step()",
        "Optimizers of torch.optim break the graph on purpose, before and after their update.",
        "Call the optimizer outside the compiled function, or compile the whole step with "
        "fusion_compile.compile_training_step.",
    ),
    _Row(
        r"zero_grad",
        r"",
        "graph_break",
        "optimizer.zero_grad()",
        "Dynamo never traces zero_grad of torch.optim.",
        "Set the gradients to None before the compiled function, or compile the whole step with "
        "fusion_compile.compile_training_step.",
    ),
    _Row(
        r"",
        r"qualname: \w*(LR|LRScheduler|Scheduler)\.step\b",
        "graph_break",
        "scheduler.step()",
        "Dynamo never traces the schedulers of torch.optim.",
        "Step the scheduler outside the compiled function.",
    ),
    _Row(
        r"RNN, GRU, or LSTM",
        r"",
        "graph_break",
        "nn.{name}",
        "By default Dynamo does not trace recurrent modules: each runs as one call of torch between two graphs.",
        "Set torch._dynamo.config.allow_rnn = True, or write the recurrence with nn.LSTMCell or nn.GRUCell. In a "
        "training step use compile_training_step(capture='run').",
    ),
    _Row(
        r"to proxy",
        r"\(Generator\)",
        "graph_break",
        "torch.Generator",
        "Dynamo cannot put an operator with a generator of its own into a graph.",
        "Draw the random numbers outside the compiled function and pass them in, or use the default generator.",
    ),
    _Row(
        r"sparse",
        r"",
        "graph_break",
        "sparse tensor",
        "Dynamo does not trace sparse tensors.",
        "Call what makes or reads sparse tensors outside the compiled function, or use a dense tensor.",
    ),
    _Row(
        r"",
        r"(module: |qualname: )(packaging|importlib\.metadata|importlib_metadata|pkg_resources|Version\b)",
        "graph_break",
        "{name}",
        "It reads the version of a library, which is the same at every call.",
        "Compare versions once, when the module is imported, and keep the result in a constant.",
    ),
    _Row(
        r"grad_fn|intermediate with requires_grad_|requires_grad_\(\) intermediate",
        r"",
        "autograd_escape",
        "",
        "A result still carries an autograd graph whose gradients were already taken.",
        "Return it detached: loss.detach().",
    ),
    _Row(
        r"Tensor\.backward\(\)|autograd\.grad",
        r"",
        "graph_break",
        "{name}",
        "By default Dynamo does not trace a gradient inside a compiled function.",
        "Use torch.autograd.grad with torch._dynamo.config.trace_autograd_ops = True, or take the gradient outside the "
        "compiled function. fusion_compile.compile_training_step compiles the whole step.",
    ),
    _Row(
        r"torch\.compiler\.disable",
        r"",
        "graph_break",
        "{name}",
        "torch.compiler.disable excludes the function from compilation.",
        "Remove the decorator, or call the function outside the compiled one.",
    ),
    _Row(
        r"torch\._dynamo\.graph_break|skip_frame|step_unsupported",
        r"",
        "graph_break",
        "torch._dynamo.graph_break()",
        "The code asks for this break.",
        "Remove the call.",
    ),
    _Row(
        r"",
        r"builtin (print|breakpoint|input)\b",
        "side_effect",
        "{name}",
        "It has an effect outside the program, which a graph cannot hold.",
        "Return the values, and print them outside the compiled function.",
    ),
    _Row(
        r"logging|debugging function",
        r"",
        "side_effect",
        "{name}",
        "It has an effect outside the program, which a graph cannot hold.",
        "Return the values, and log them outside the compiled function.",
    ),
    _Row(
        r"",
        r"builtin open\b|IOWrapper|Buffered(Reader|Writer)|module: (torch\.serialization|io|os|shutil|pickle|posix)\b",
        "side_effect",
        "{name}",
        "It reads or writes a file, which a graph cannot hold.",
        "Read files before the compiled function. Return the tensors to be written, and write them after it.",
    ),
    _Row(
        r"",
        r"module: (time|datetime)\b",
        "side_effect",
        "{name}",
        "It reads the clock, which a graph cannot hold.",
        "Read the clock outside the compiled function, and pass values that depend on it as tensors.",
    ),
    _Row(
        r"",
        r"qualname: (Random|RandomState|Generator)\.|module: (random|secrets|numpy\.random)",
        "side_effect",
        "{name}",
        "It draws from a random generator of Python or numpy, whose state a graph cannot hold.",
        "Draw with torch (torch.rand on the tensor's device), or outside the compiled function.",
    ),
    _Row(
        r"numpy|ndarray",
        r"",
        "host_sync",
        "{name}",
        "numpy needs the tensor on the CPU.",
        "Use torch's operators, which stay on the device.",
    ),
    _Row(
        r"marked as skipped|not implemented in python",
        r"likely a C extension|builtin",
        "graph_break",
        "{name}",
        "It is compiled code that Dynamo cannot see into.",
        "Use torch's operators, wrap it with torch.library.custom_op, or call it outside the compiled function.",
    ),
    _Row(
        r"marked as skipped",
        r"",
        "graph_break",
        "{name}",
        "Dynamo never traces into this function.",
        "Call it outside the compiled function.",
    ),
)

_EMPTY_HINT = re.compile(
    r"report an issue|fundamental|Dynamo bug|file an issue|error in eager|possible to write Dynamo", re.IGNORECASE
)


def is_consequence(what: str) -> bool:
    """Whether a break of this name only follows from another one, without which the leaf would stay in the graph."""
    return re.search(r"intermediate with requires_grad_|requires_grad_\(\) intermediate", what) is not None


def plain_words(what: str, context: str, explanation: str, hints: Sequence[str], files: Sequence[str]) -> Words:
    """Describe a break that torch calls `what`.

    `files`: those of the frames that lead to it, outermost first. A break without a rule keeps torch's own words.
    """
    if re.search(r"qualname: \w*\.?zero_grad", context):
        what = "zero_grad"
    elif (files and files[-1].startswith(_OPTIMIZERS)) or _OPTIMIZER.search(context):
        what = "optimizer"
    name = _name(context)
    for row in _ROWS:
        if re.search(row.what, what) and re.search(row.context, context):
            return Words(row.kind, row.op.format(name=name or what) or what, row.why, row.remedy)
    why = explanation if explanation.endswith(".") else f"{explanation or what}."
    useful = next((hint for hint in hints if not _EMPTY_HINT.search(hint)), "")
    return Words("graph_break", name or what, why, useful or "Move it outside the compiled function.")


def _name(context: str) -> str:
    """Return the name of the callee in a debug context: ``time.time()``, ``tensor.item()``, ``aten.nonzero``."""
    if found := re.search(r"module: ([\w.]+), qualname: ([\w.]+)", context):
        return f"{found[1]}.{found[2]}()"
    if found := re.search(r"call_method TensorVariable\(\) (\w+)", context):
        return f"tensor.{found[1]}()"
    if found := re.search(r"^(RNN|GRU|LSTM)\(", context):
        return found[1]
    if found := re.search(r"^aten\.\w+", context):
        return found[0]
    found = re.search(r"(?:qualname:|<function|<bound method|builtin) ([\w.<>]+)", context)
    return f"{found[1].rpartition('<locals>.')[2]}()" if found else ""
