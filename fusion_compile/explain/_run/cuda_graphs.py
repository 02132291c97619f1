"""CUDA graphs: how many were recorded, which were skipped, cut or recorded again, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fusion_compile.explain._facts import CudaGraphs, CudaGraphSkip, Rerecord
from fusion_compile.explain._run.stacks import stack_frames, users_line
from fusion_compile.passes import Finding

_SKIP = re.compile(r"^skipping cudagraphs? due to (?P<reason>.*)", re.DOTALL)
_PARTITIONS = re.compile(r"Created \d+ graph partitions: (?P<count>\d+) cudagraphable, (?P<not>\d+) non-cudagraphable")
_CUT_OUT = re.compile(r"^ +(?P<name>\w+): reason=(?P<reason>.+?), ir=\w+(?:, fx=(?P<fx>.*))?$")
_RECORDED = re.compile(r"\bRecording function=")
_AGAIN = re.compile(r"Re-recording function=(?P<function>[^,]+).*?reason=(?P<reason>.*)", re.DOTALL)


def read_cuda_graphs(lines: Sequence[str], skips_counted: int) -> CudaGraphs:
    """Read the lines of Inductor's log. `skips_counted`: torch's own count of skips; a skip that no line explains is
    kept without a reason."""
    skips = [CudaGraphSkip(_reason(found["reason"]), _line(line)) for line in lines if (found := _SKIP.match(line))]
    skips += [CudaGraphSkip("torch gives no reason", "")] * max(0, skips_counted - len(skips))
    return CudaGraphs(
        captures=sum(bool(_RECORDED.search(line)) and not _AGAIN.search(line) for line in lines),
        partitions=sum(int(found["count"]) for line in lines if (found := _PARTITIONS.search(line))),
        skips=tuple(dict.fromkeys(skips)) if len(skips) == skips_counted else tuple(skips),
        rerecords=tuple(Rerecord(_reason(found["reason"])) for line in lines if (found := _AGAIN.search(line))),
    )


def cuda_graph_findings(lines: Sequence[str], facts: CudaGraphs) -> tuple[Finding, ...]:
    """Return one finding for each reason for a skip, a cut or a repeated recording."""
    found = [_skip_finding(skip) for skip in facts.skips]
    found += _cuts(lines)
    for again in facts.rerecords:
        why, remedy = _why_again(again.reason)
        found.append(Finding("rerecord", "CUDA graph", _line(again.reason), why, remedy, "warning"))
    return tuple(dict.fromkeys(found))


def _reason(text: str) -> str:
    """Remove the stack that torch appends to a reason."""
    return text.partition("Found from")[0].strip().rstrip(".")


def _line(text: str) -> str:
    """Return the user's line in a message's stack, or ""."""
    return users_line(stack_frames(text))


_SKIPS = (
    (
        r"mutated inputs",
        "the program writes into an input whose address may change between calls",
        "Mark it with torch._dynamo.mark_static_address(tensor, guard=False) before the first call; never rebind it.",
    ),
    (
        r"input storage mutation",
        "the program gives an input other memory (set_, .data =)",
        "Copy into the input's own memory with copy_.",
    ),
    (r"cpu device", "a tensor lies on the CPU", "Move it to the program's device once, before the first call."),
    (r"multiple devices", "tensors lie on several devices", "Keep all tensors of the program on one device."),
    (
        r"re-recording limit",
        "it was recorded again so often that torch gave up",
        "Remove the cause of the repeated recordings; see the findings of kind rerecord.",
    ),
    (
        r"dynamic|symbolic shapes|[Ss]ym[Ii]nt",
        "a size varies, and torch is set not to record one graph for each size",
        "Pad or bucket to a few sizes, or compile with dynamic=False.",
    ),
    (
        r"caching allocator",
        "a CUDA graph takes its memory from the caching allocator, which is switched off",
        "Switch it on: unset PYTORCH_NO_CUDA_MEMORY_CACHING.",
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
                "cudagraph_skip",
                "CUDA graph",
                skip.where,
                f"No CUDA graph was recorded: {why} ({skip.reason}).",
                remedy,
            )
    remedy = "Run with TORCH_LOGS=cudagraphs to see torch's own messages."
    return Finding("cudagraph_skip", "CUDA graph", skip.where, f"No CUDA graph was recorded: {skip.reason}.", remedy)


def _cuts(lines: Sequence[str]) -> list[Finding]:
    """Return a finding for each operator that runs between CUDA graphs. The log prints its stack on the next lines."""
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
            remedy = "Keep it on the device, or replace it by an operator that a CUDA graph can hold."
            found.append(Finding("cudagraph_partition", op, _line("\n".join(stack)), why, remedy, "warning"))
    return found


def _why_again(reason: str) -> tuple[str, str]:
    if "pointer changed" in reason or "StaticInputIdxMismatch" in reason:
        return (
            f"The CUDA graph was recorded again because a tensor moved that must keep its address ({_first(reason)}).",
            "Write new values into the tensor with copy_ instead of binding a new tensor.",
        )
    return (
        f"The CUDA graph was recorded again ({_first(reason)}).",
        "Keep memory and order of calls the same from step to step, and clone results that you keep.",
    )


def _first(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(". ")
