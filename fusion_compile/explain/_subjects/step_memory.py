"""The highest point of memory that a step's compiled programs reach, predicted, and what is alive there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from torch import Tensor

from fusion_compile._program.program import Program
from fusion_compile.explain._facts import Alive, CompiledPeak, Section, section

_MOST = 8


def compiled_peaks(programs: Mapping[str, Program], kept: Iterable[Tensor]) -> list[CompiledPeak]:
    """One for each program whose compiler's schedule is known; none for programs compiled in regions.

    `kept`: the tensors that are there between steps. A batch is not among them.
    """
    held = bytes_of(kept)
    found = []
    for name, program in programs.items():
        peak = None if program.compiled else program.schedule.peak()
        if peak is not None:
            alive = [
                Alive(
                    f"{one.dtype} {list(one.shape)} of {one.name}" if one.name else f"{one.dtype} {list(one.shape)}",
                    one.bytes,
                    "",
                )
                for one in peak.alive
            ]
            found.append(CompiledPeak(name, held + peak.bytes, held, peak.kernel, tuple(alive)))
    return found


def peak_section(peak: CompiledPeak) -> Section:
    """Its table: what is kept, and the largest of what is alive besides."""
    largest, rest = peak.alive[:_MOST], peak.alive[_MOST:]
    at = f", at {peak.at}" if peak.at else ""
    rows = [(f"highest point{at}", _mib(peak.bytes)), ("of it kept between steps", _mib(peak.kept_bytes))]
    rows += [(one.name, _mib(one.bytes)) for one in largest]
    if rest:
        rows.append((f"{len(rest)} smaller", _mib(sum(one.bytes for one in rest))))
    return section(f"Memory of {peak.program} as compiled, predicted", ("alive then", "MiB"), rows)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all memory behind `tensors`; what several lie in counts once, wherever in it they begin."""
    spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for t in tensors for s in [t.untyped_storage()]})
    ends = itertools.accumulate((end for _, end in spans), max, initial=0)
    return sum(max(0, end - max(begin, before)) for (begin, end), before in zip(spans, ends, strict=False))


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"
