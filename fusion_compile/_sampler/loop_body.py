"""Lower a body for its mode: eager, compiled pieces, or one CUDA graph of compiled pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fusion_compile._program.cuda_graph import Replay, why_not_captured
from fusion_compile._program.lower import without_cuda_graph
from fusion_compile._program.pieces import compile_pieces


@dataclass(frozen=True)
class LoopBody:
    """`run`: the body. `repeated`: how often it calls each block that was compiled once. `captured`: whether it is one
    CUDA graph. `not_captured`: why it is not, in a mode that asks for one."""

    run: Callable[..., Any]
    repeated: dict[str, int] = field(default_factory=dict)
    captured: bool = False
    not_captured: str | None = None


def loop_body(body: fx.GraphModule, live: Sequence[Tensor], *, mode: str, backend: str) -> LoopBody:
    """Lower `body`, which reads weights and rows from its attributes and takes tensors like `live`, for `mode`."""
    if mode == "eager":
        return LoopBody(body)
    pieces, repeated = compile_pieces(body, mode=without_cuda_graph(mode), backend=backend)
    if without_cuda_graph(mode) == mode or not any(t.device.type == "cuda" for t in live):
        return LoopBody(pieces, repeated)

    def fixed() -> list[Tensor]:  # runs at every call; the dictionaries are quicker than parameters()
        return [t for t in (*pieces._parameters.values(), *pieces._buffers.values()) if t is not None]

    why = why_not_captured(body, (*fixed(), *live))
    if why is not None:
        return LoopBody(pieces, repeated, not_captured=why)
    return LoopBody(Replay(pieces, fixed), repeated, captured=True)
