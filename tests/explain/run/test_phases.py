"""Phases of compilation and uses of caches."""

from __future__ import annotations

from fusion_compile.explain._run.listen import TraceRecord
from fusion_compile.explain._run.phases import read_cache_use, read_phases


def test_phases_are_told_without_the_phases_inside_them() -> None:
    metrics = {"entire_frame_compile_time_s": 10.0, "backend_compile_time_s": 7.0, "inductor_compile_time_s": 5.0}
    phases = read_phases([TraceRecord("compilation_metrics", "0/0", {**metrics, "code_gen_time_s": None}, "")] * 2)
    assert [phase.seconds for phase in phases] == [6.0, 4.0, 10.0]


def test_caches_count_whatever_their_records_hold() -> None:
    kinds = [
        "fx_graph_cache_hit",
        "fx_graph_cache_miss",
        "aotautograd_cache_miss",
        "fx_graph_cache_bypass",
        "other_hit",
    ]
    use = read_cache_use([TraceRecord(kind, "0/0", {}, "") for kind in kinds])
    assert (use.hits, use.misses, use.bypasses) == (1, 2, 1)
