"""What torch's reasons for a graph break mean, and what to do: a table over torch's own names for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Words(NamedTuple):
    kind: str
    op: str
    why: str
    remedy: str


class _Row(NamedTuple):
    """`what`, `context`: patterns of torch's name for the break and of its debug context. `op`: how to write the
    operator, with ``{name}`` for what the context calls it; empty for torch's name of the break."""

    what: str
    context: str
    kind: str
    op: str
    why: str
    remedy: str


_TENSOR_READ = "Keep the value as a tensor: torch.where instead of if, a 0-dim tensor instead of a number."

_ROWS = (
    _Row(
        r"Tensor\.(item|tolist|numpy)\(\)|Unsupported Tensor\.(item|tolist)|Data dependent operator",
        r"",
        "host_sync",
        "{name}",
        "It brings a value to the host, which waits for the device to finish everything before it.",
        _TENSOR_READ,
    ),
    _Row(
        r"Data-dependent (branching|assertion)|symbolic_shapes.guard_scalar",
        r"",
        "host_sync",
        "if",
        "Python chooses its way by a tensor's value, so the host waits for the value.",
        "Compute both ways and choose with torch.where.",
    ),
    _Row(
        r"Dynamic shape operator|Dynamic slicing with Tensor",
        r"",
        "host_sync",
        "{name}",
        "The shape of its result depends on the data, so the host waits for the count.",
        "Use torch.where or a product with the mask, which keep the shape.",
    ),
    _Row(
        r"optimizer",
        r"",
        "graph_break",
        "optimizer.step()",
        "Optimizers of torch.optim break the graph on purpose, before and after their update.",
        "Call the optimizer outside of the compiled function, or compile the whole step with "
        "fusion_compile.compile_training_step.",
    ),
    _Row(
        r"grad_fn|intermediate with requires_grad_|requires_grad_\(\) intermediate",
        r"",
        "autograd_escape",
        "",
        "A result still carries the graph from which gradients were already taken.",
        "Return it detached: loss.detach().",
    ),
    _Row(
        r"Tensor\.backward\(\)|autograd\.grad",
        r"",
        "graph_break",
        "{name}",
        "Dynamo does not trace a gradient inside a compiled function unless it is told to.",
        "Take it with torch.autograd.grad under torch._dynamo.config.trace_autograd_ops = True, or outside of the "
        "compiled function; fusion_compile.compile_training_step compiles the whole step.",
    ),
    _Row(
        r"torch\.compiler\.disable",
        r"",
        "graph_break",
        "{name}",
        "The function was kept from being compiled with torch.compiler.disable.",
        "Take the decorator away, or call the function outside of the compiled one.",
    ),
    _Row(
        r"torch\._dynamo\.graph_break|skip_frame|step_unsupported",
        r"",
        "graph_break",
        "torch._dynamo.graph_break()",
        "Somebody asked for the break.",
        "Take the call away.",
    ),
    _Row(
        r"",
        r"builtin (print|breakpoint|input)\b",
        "side_effect",
        "{name}",
        "It acts on the world outside the program, which a graph cannot hold.",
        "Return what you want to see, and print it outside of the compiled function.",
    ),
    _Row(
        r"logging|debugging function",
        r"",
        "side_effect",
        "{name}",
        "It acts on the world outside the program, which a graph cannot hold.",
        "Return what you want to see, and log it outside of the compiled function.",
    ),
    _Row(
        r"",
        r"builtin open\b|IOWrapper|Buffered(Reader|Writer)|module: (torch\.serialization|io|os|shutil|pickle|posix)\b",
        "side_effect",
        "{name}",
        "It reads or writes a file, which a graph cannot hold.",
        "Read before and write after the compiled function; return the tensors that are to be written.",
    ),
    _Row(
        r"",
        r"module: (time|datetime)\b",
        "side_effect",
        "{name}",
        "It reads the clock, which a graph cannot hold.",
        "Read the clock outside of the compiled function and pass what depends on it as a tensor.",
    ),
    _Row(
        r"",
        r"qualname: (Random|RandomState|Generator)\.|module: (random|secrets|numpy\.random)",
        "side_effect",
        "{name}",
        "It draws from a random generator of Python's or numpy's, whose state a graph cannot hold.",
        "Draw with torch (torch.rand on the tensor's device), or outside of the compiled function.",
    ),
    _Row(
        r"numpy|ndarray",
        r"",
        "host_sync",
        "{name}",
        "It leaves torch for numpy, for which the tensor has to be on the host.",
        "Write it with torch's operators, which stay on the device.",
    ),
    _Row(
        r"marked as skipped|not implemented in python",
        r"likely a C extension|builtin",
        "graph_break",
        "{name}",
        "It is compiled code that Dynamo cannot see into.",
        "Use torch operators, wrap it with torch.library.custom_op, or call it outside of the compiled function.",
    ),
    _Row(
        r"marked as skipped",
        r"",
        "graph_break",
        "{name}",
        "It is on the list of what Dynamo never looks into.",
        "Call it outside of the compiled function.",
    ),
)

_EMPTY_HINT = re.compile(
    r"report an issue|fundamental|Dynamo bug|file an issue|error in eager|possible to write Dynamo", re.IGNORECASE
)


def is_consequence(what: str) -> bool:
    """Whether a break of this name comes of another one: a leaf that would not have left the graph without it."""
    return re.search(r"intermediate with requires_grad_|requires_grad_\(\) intermediate", what) is not None


def plain_words(what: str, context: str, explanation: str, hints: Sequence[str], files: Sequence[str]) -> Words:
    """Of a break that torch calls `what`. `files`: those of the frames that lead there, outermost first. What no row
    knows is told in torch's own words."""
    if (files and "/torch/optim/" in files[-1].replace("\\", "/")) or context.startswith("qualname: Optimizer."):
        what = "optimizer"
    name = _name(context)
    for row in _ROWS:
        if re.search(row.what, what) and re.search(row.context, context):
            return Words(row.kind, row.op.format(name=name or what) or what, row.why, row.remedy)
    why = explanation if explanation.endswith(".") else f"{explanation or what}."
    useful = next((hint for hint in hints if not _EMPTY_HINT.search(hint)), "")
    return Words("graph_break", name or what, why, useful or "Move it outside of the compiled function.")


def _name(context: str) -> str:
    """What the debug context is about, as one would write it: ``time.time()``, ``tensor.item()``, ``aten.nonzero``."""
    if found := re.search(r"module: ([\w.]+), qualname: ([\w.]+)", context):
        return f"{found[1]}.{found[2]}()"
    if found := re.search(r"call_method TensorVariable\(\) (\w+)", context):
        return f"tensor.{found[1]}()"
    if found := re.search(r"^aten\.\w+", context):
        return found[0]
    found = re.search(r"(?:qualname:|<function|<bound method|builtin) ([\w.<>]+)", context)
    return f"{found[1].rpartition('<locals>.')[2]}()" if found else ""
