"""CUDA graphs: what was captured, what was skipped or cut out and why, and what was recorded again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fusion_compile.explain._facts import CudaGraphs, CudaGraphSkip, Rerecord
from fusion_compile.explain._run.graph_breaks import stack_frames
from fusion_compile.passes import Finding
from fusion_compile.passes._user_frame import is_the_users

_SKIP = re.compile(r"^skipping cudagraphs? due to (?P<reason>.*)", re.DOTALL)
_PARTITIONS = re.compile(r"Created \d+ graph partitions: (?P<count>\d+) cudagraphable, (?P<not>\d+) non-cudagraphable")
_CUT_OUT = re.compile(r"^ +(?P<name>\w+): reason=(?P<reason>.+?), ir=\w+(?:, fx=(?P<fx>.*))?$")
_RECORDED = re.compile(r"\bRecording function=")
_AGAIN = re.compile(r"Re-recording function=(?P<function>[^,]+).*?reason=(?P<reason>.*)", re.DOTALL)


def read_cuda_graphs(lines: Sequence[str], skips_counted: int) -> CudaGraphs:
    """From the lines of Inductor's log. `skips_counted`: how many torch counted itself; those that no line explains are
    kept as skips without a reason."""
    skips = [CudaGraphSkip(_reason(found["reason"]), _line(line)) for line in lines if (found := _SKIP.match(line))]
    skips += [CudaGraphSkip("torch gives no reason", "")] * max(0, skips_counted - len(skips))
    return CudaGraphs(
        captures=sum(bool(_RECORDED.search(line)) and not _AGAIN.search(line) for line in lines),
        partitions=sum(int(found["count"]) for line in lines if (found := _PARTITIONS.search(line))),
        skips=tuple(dict.fromkeys(skips)) if len(skips) == skips_counted else tuple(skips),
        rerecords=tuple(Rerecord(_reason(found["reason"])) for line in lines if (found := _AGAIN.search(line))),
    )


def cuda_graph_findings(lines: Sequence[str], facts: CudaGraphs) -> tuple[Finding, ...]:
    """Of each reason for a skip, a cut or a new recording one."""
    found = [_skip_finding(skip) for skip in facts.skips]
    found += _cuts(lines)
    for again in facts.rerecords:
        why, remedy = _why_again(again.reason)
        found.append(Finding("rerecord", "CUDA graph", _line(again.reason), why, remedy, "warning"))
    return tuple(dict.fromkeys(found))


def _reason(text: str) -> str:
    """Without the stack that torch appends."""
    return text.partition("Found from")[0].strip().rstrip(".")


def _line(text: str) -> str:
    """``file:line`` of the innermost frame of the user's in a message's stack, or ``""``."""
    frames = [f for f in stack_frames(text) if is_the_users(f[0])]
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


_SKIPS = (
    (
        r"mutated inputs",
        "the program writes into an input whose address may change between calls",
        "Mark it with torch._dynamo.mark_static_address(tensor, guard=False) before the first call; never rebind it.",
    ),
    (
        r"input storage mutation",
        "the program gives an input another memory (set_, .data =)",
        "Copy into the input's own memory with copy_.",
    ),
    (r"cpu device", "a tensor lies on the CPU", "Move it to the program's device once, before the first call."),
    (r"multiple devices", "tensors lie on several devices", "Keep all tensors of the program on one device."),
    (
        r"re-recording limit",
        "it was recorded again so often that torch gave up",
        "Remove what makes it record again: see the findings of that kind.",
    ),
    (
        r"dynamic|symbolic shapes|[Ss]ym[Ii]nt",
        "a size varies, and torch was told not to record one graph for each",
        "Pad or bucket to a few sizes, or compile with dynamic=False.",
    ),
    (
        r"caching allocator",
        "the caching allocator is switched off, from which a CUDA graph takes its memory",
        "Leave it on (PYTORCH_NO_CUDA_MEMORY_CACHING unset).",
    ),
    (
        r"incompatible op|unsafe|unsupported|non-Tensor|sparse|complex",
        "an operator or an input cannot be part of a CUDA graph",
        "Replace it, or call it outside of the compiled function.",
    ),
)


def _skip_finding(skip: CudaGraphSkip) -> Finding:
    for pattern, why, remedy in _SKIPS:
        if re.search(pattern, skip.reason):
            return Finding(
                "cudagraph_skip", "CUDA graph", skip.where, f"None was recorded: {why} ({skip.reason}).", remedy
            )
    remedy = "Run with TORCH_LOGS=cudagraphs for what torch knows of it."
    return Finding("cudagraph_skip", "CUDA graph", skip.where, f"None was recorded: {skip.reason}.", remedy)


def _cuts(lines: Sequence[str]) -> list[Finding]:
    """One finding for each operator that is run between CUDA graphs. Its stack stands on the lines after it."""
    found = []
    for i, line in enumerate(lines):
        if cut := _CUT_OUT.match(line):
            stack = []
            for after in lines[i + 1 :]:
                if not after.startswith("         "):
                    break
                stack.append(after)
            op = (cut["fx"] or cut["name"]).partition("(")[0]
            why = f"It runs between two CUDA graphs instead of inside one ({cut['reason']})."
            remedy = "Keep it on the device, or replace it by an operator that can be captured."
            found.append(Finding("cudagraph_partition", op, _line("\n".join(stack)), why, remedy, "warning"))
    return found


def _why_again(reason: str) -> tuple[str, str]:
    if "pointer changed" in reason or "StaticInputIdxMismatch" in reason:
        return (
            f"The CUDA graph was recorded again, because a tensor that keeps its address moved ({_first(reason)}).",
            "Write new values into it with copy_ instead of binding a new tensor.",
        )
    return (
        f"The CUDA graph was recorded again ({_first(reason)}).",
        "Keep the memory and the order of calls the same from step to step; clone results that you keep.",
    )


def _first(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(". ")
