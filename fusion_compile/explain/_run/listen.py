"""Record torch's log messages while a program compiles and runs, and leave its loggers unchanged."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fusion_compile.explain import _compat


@dataclass(frozen=True)
class TraceRecord:
    """One record of the structured trace.

    `kind`: ``"compilation_metrics"``, or an artifact's own name. `compile_id`: ``"0/1"``, or "" outside a compilation.
    `data`: the record's content. `payload`: its text.
    """

    kind: str
    compile_id: str
    data: Any
    payload: str


@dataclass(frozen=True)
class FusionLine:
    """The reason why two scheduler nodes were not fused, and the FX nodes that they compute."""

    text: str
    first: tuple[str, ...]
    second: tuple[str, ...]


@dataclass
class Heard:
    """Torch's messages in their order.

    `cuda_graph_skips`: torch's own count of skips. `not_understood`: errors from messages that could not be read.
    """

    trace: list[TraceRecord] = field(default_factory=list)
    fusion: list[FusionLine] = field(default_factory=list)
    cuda_graphs: list[str] = field(default_factory=list)
    cuda_graph_skips: int = 0
    not_understood: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[TraceRecord]:
        return [record for record in self.trace if record.kind == kind]


_CONTEXT = {
    "rank",
    "compiled_autograd_id",
    "frame_id",
    "frame_compile_id",
    "attempt",
    "has_payload",
    "stack",
    "subgraph_name",
}
PHASES = ("create_aot_dispatcher_function", "inductor_compile", "code_gen")
"""Spans of torch's own timeline, from the outermost to the innermost."""
_UNUSED = {"str", "describe_storage", "expression_created"}


def _trace_record(record: logging.LogRecord, heard: Heard) -> None:
    said: dict[str, Any] = getattr(record, "metadata", {})
    kind = next((key for key in said if key not in _CONTEXT), "")
    if kind in _UNUSED:
        return
    data = said.get(kind)
    if kind == "chromium_event":
        data = json.loads(getattr(record, "payload", None) or "{}")
        if data.get("name") not in PHASES:
            return
    if kind == "artifact" and isinstance(data, dict):
        kind = str(data.get("name", ""))
    place = (said.get("frame_id"), said.get("frame_compile_id"))
    compile_id = "" if None in place else f"{place[0]}/{place[1]}"
    heard.trace.append(TraceRecord(kind, compile_id, data, getattr(record, "payload", None) or ""))


def _fusion_line(record: logging.LogRecord, heard: Heard) -> None:
    text = record.getMessage()
    if text.startswith("cannot fuse "):
        first, _, second = text.removeprefix("cannot fuse ").partition(":")[0].partition(" with ")
        heard.fusion.append(FusionLine(text, _compat.fx_names(first), _compat.fx_names(second)))


def _cuda_graph_line(record: logging.LogRecord, heard: Heard) -> None:
    heard.cuda_graphs.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Record torch's messages inside the block; the record is complete when the block ends. Other listeners get the
    messages that they would get anyway."""
    _compat.import_inductor()
    heard = Heard()
    skips = _compat.cuda_graph_skips()
    nothing = logging.NullHandler()
    with contextlib.ExitStack() as overheard:
        overheard.enter_context(_overheard(_compat.TRACE_LOG, _trace_record, heard))
        for name in _compat.FUSION_LOGS:
            overheard.enter_context(_overheard(name, _fusion_line, heard))
        for name in _compat.CUDA_GRAPH_LOGS:
            overheard.enter_context(_overheard(name, _cuda_graph_line, heard))
        logging.getLogger(_compat.TRACE_LOG).addHandler(nothing)  # torch writes no trace without a handler
        try:
            yield heard
        finally:
            logging.getLogger(_compat.TRACE_LOG).removeHandler(nothing)
            heard.cuda_graph_skips = _compat.cuda_graph_skips() - skips


@contextlib.contextmanager
def _overheard(name: str, note: Callable[[logging.LogRecord, Heard], None], heard: Heard) -> Iterator[None]:
    """Pass every record of the logger to `note`, whatever its level. Other handlers get what they would get anyway."""
    logger = logging.getLogger(name)
    level, disabled, wanted = logger.level, logger.disabled, logger.getEffectiveLevel()

    def keep(record: logging.LogRecord) -> bool:
        try:
            note(record, heard)
        except Exception as error:  # an error here must not stop the compilation
            heard.not_understood.append(f"{type(error).__name__}: {error}")
        return not disabled and record.levelno >= wanted

    logger.setLevel(logging.DEBUG)
    logger.disabled = False
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
        logger.disabled = disabled
        logger.setLevel(level)
