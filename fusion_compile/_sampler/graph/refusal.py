"""Explain why a model could not be exported, with the line of its source."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Sequence

from fusion_compile._compat import DATA_DEPENDENT
from fusion_compile.passes._user_frame import is_the_users


def refusal(
    model_name: str, shapes: Sequence[Sequence[int]], error: Exception, call_on_fakes: Callable[[], object]
) -> ValueError:
    """The error to raise instead of `error`, which torch.export raised for a model and inputs of `shapes`.

    It names the innermost line of the model's source and the likely reason. `call_on_fakes` calls the model on tensors
    without contents, where reading contents fails at the line that reads; export fails at a later line.
    """
    at_fault = innermost_frame(error)
    try:
        call_on_fakes()
    except DATA_DEPENDENT as look:
        reader = innermost_frame(look)
        reason = (
            f"The contents of a tensor decide what its Python code does: they are read{_at(reader)}. Export sees no "
            f"contents; use tensor operations there, or an argument that is no tensor."
        )
    except Exception as own:
        at_fault, error = innermost_frame(own), own
        reason = "The model itself refuses these arguments, with or without export; call it as its forward wants."
    else:
        reason = (
            "It runs, but torch.export cannot write it down: every call must do the same tensor operations, on tensors "
            "that are arguments, parameters or buffers."
        )
    lines = str(error).strip().splitlines()
    said = lines[0].rstrip(".! ") if lines else "no message"
    return ValueError(
        f"{model_name} could not be exported for {[tuple(shape) for shape in shapes]}: "
        f"{type(error).__name__}{_at(at_fault)}: {said}. {reason}"
    )


def innermost_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The deepest frame in the error's traceback, or its cause's, that is neither torch's, Python's nor ours."""
    paths = sysconfig.get_paths()
    seen: BaseException | None = error
    while seen is not None:
        for frame in reversed(traceback.extract_tb(seen.__traceback__)):
            name = frame.filename
            from_python = name.startswith(paths["stdlib"]) and not name.startswith((paths["purelib"], paths["platlib"]))
            if is_the_users(name) and not from_python:
                return frame
        seen = seen.__cause__ or seen.__context__
    return None


def _at(frame: traceback.FrameSummary | None) -> str:
    return f" at {frame.filename}:{frame.lineno} (`{(frame.line or '').strip()}`)" if frame else ""
