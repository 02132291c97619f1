"""Find where a loss reads a tensor's value on the CPU, and say so in one sentence."""

from __future__ import annotations

import linecache
import re
import traceback
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusion_compile import _compat
from fusion_compile.passes._user_frame import is_the_users

_READS = {
    Tensor.cpu: "tensor.cpu()",
    Tensor.numpy: "tensor.numpy()",
    Tensor.__array__: "a conversion to numpy",
    Tensor.__repr__: "printing a tensor",
    Tensor.__format__: "formatting a tensor",
}
"""Reads that fake tensors let pass or refuse obscurely. ``.item()``, ``if`` and the like they refuse clearly."""


class HostRead(Exception):
    """A value was read. Raised at the read itself, so that the traceback leads to the user's line."""


class RefuseHostReads(TorchFunctionMode):
    """Raise `HostRead` at each conversion or print that needs a tensor's value on the CPU, on every device alike."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise HostRead(_READS[func])
        out = func(*args, **(kwargs or {}))
        if func is Tensor.to and out.device.type == "cpu" != args[0].device.type:
            raise HostRead("tensor.to('cpu')")
        return out


def where_in_user_code(frames: list[traceback.FrameSummary]) -> str:
    """``file:line: source`` of the innermost frame outside torch and this package; else empty."""
    for frame in reversed(frames):
        if is_the_users(frame.filename):
            line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{frame.filename}:{frame.lineno}: {line}"
    return ""


def host_read_message(frames: list[traceback.FrameSummary], detail: str) -> str:
    """The sentence for a loss that needs a value on the CPU."""
    where = where_in_user_code(frames) or "the loss"
    return (
        f"{where}\nreads a tensor's value on the host or has a shape that depends on one ({detail.splitlines()[0]}); a "
        f"captured step cannot. Keep it on the device: torch.where instead of if, a returned metric instead of .item() "
        f"or print; or take mode='eager', which runs Python at every step."
    )


def not_captured_message(frames: list[traceback.FrameSummary], detail: str) -> str:
    """The sentence for a loss that cannot be one graph for any reason besides a host sync."""
    where = where_in_user_code(frames) or "the loss"
    context = re.search(r"Developer debug context: *(\S.*)", detail)
    what = (detail.strip() or "no message").splitlines()[0] + (f": {context[1]}" if context else "")
    return (
        f"{where}\ncannot be captured as one graph ({what}). Keep the loss to tensor operations and plain Python, and "
        f"do the rest outside it; mode='eager' runs it uncaptured."
    )


def refused_graph_message(error: Exception) -> str:
    """The sentence for a captured graph that the compiler does not take."""
    found = _IN_TEXT.findall(str(error))
    frames = [traceback.FrameSummary(file, int(line), name, line=text) for file, line, name, text in found]
    where = where_in_user_code(frames) or "the loss"
    return (
        f"{where}\nwas captured, but the compiler refuses the graph: {_compat.compilers_reason(error)}. "
        f"mode='eager' runs the loss uncompiled."
    )


_IN_TEXT = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.*)')
"""Lines of a traceback in an error's text."""


def not_on_fakes_message(error: Exception) -> str:
    """The sentence for a loss that runs, but not on tensors without data, on which every capture runs it."""
    where = where_in_user_code(list(traceback.extract_tb(error.__traceback__))) or "the loss"
    lines = str(error).strip().splitlines()
    return (
        f"{where}\ncannot be captured: it runs on real tensors, but not on tensors without data "
        f"({type(error).__name__}: {lines[0] if lines else 'no message'}). Keep to tensor operations there, or take "
        f"mode='eager'."
    )
