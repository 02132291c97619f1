"""Phases of compilation and uses of caches."""

from __future__ import annotations

from fusion_compile.explain._run.listen import TraceRecord
from fusion_compile.explain._run.phases import read_cache_use, read_phases


def test_phases_are_told_without_the_phases_inside_them() -> None:
    metrics = {"entire_frame_compile_time_s": 10.0, "backend_compile_time_s": 7.0, "inductor_compile_time_s": 5.0}
    phases = read_phases([TraceRecord("compilation_metrics", "0/0", {**metrics, "code_gen_time_s": None}, "")] * 2)
    assert [phase.seconds for phase in phases] == [6.0, 4.0, 10.0]


def test_what_the_backend_compiles_without_dynamo_is_read_from_the_timeline() -> None:
    def event(name: str, phase: str, seconds: float, compile_id: str = "") -> TraceRecord:
        return TraceRecord("chromium_event", compile_id, {"name": name, "ph": phase, "ts": seconds * 1e6}, "")

    own = [
        event("create_aot_dispatcher_function", "B", 1.0),
        event("inductor_compile", "B", 2.0),
        event("code_gen", "B", 3.0),
        event("code_gen", "E", 7.0),
        event("inductor_compile", "E", 8.0),
        event("create_aot_dispatcher_function", "E", 10.0),
    ]
    of_dynamo = [event("code_gen", phase, at, "0/0") for phase, at in (("B", 0.0), ("E", 100.0))]  # in its metrics
    phases = read_phases([*own, *of_dynamo])
    assert [(p.name.split(":")[0], p.seconds) for p in phases] == [("AOTAutograd", 3), ("Inductor", 2), ("Code", 4)]


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
