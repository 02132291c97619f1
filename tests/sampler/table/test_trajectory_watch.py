"""Where trajectories start, and when the CPU stops looking."""

from __future__ import annotations

from fusion_compile._sampler.table.trajectory_watch import TrajectoryWatch


def watch(verify: str = "trajectory") -> TrajectoryWatch:
    return TrajectoryWatch(look_always=False, verify=verify)  # type: ignore[arg-type]


def run(followed: TrajectoryWatch, rows: range, request: str = "a", new: bool = False) -> list[bool]:
    return [followed.count_seen(row, request, new=new and i == 0) for i, row in enumerate(rows)]


def test_a_trajectory_starts_where_rows_fall_or_the_first_returns_for_its_request() -> None:
    followed = watch()
    assert run(followed, range(3), new=True) == [True, False, False]
    assert run(followed, range(3)) == [True, False, False]
    assert followed.count_seen(0, "b", new=True)
    assert not followed.count_seen(1, "b", new=False)


def test_guidance_in_two_calls_at_one_timestep_starts_once() -> None:
    followed = watch()
    calls = [(row, request) for row in range(2) for request in ("a", "b")] * 2
    starts = [followed.count_seen(row, request, new=i < 2) for i, (row, request) in enumerate(calls)]
    assert starts == [True, True, False, False, True, False, False, False]


def test_a_caller_is_trusted_after_two_schedules_and_looked_at_where_the_next_should_start() -> None:
    followed = watch()
    looks = []
    for call in range(12):
        row = call % 3
        looks.append(followed.must_look("a", 3))
        if looks[-1]:
            followed.count_seen(row, "a", new=call == 0)
        else:
            followed.count_unseen()
    assert looks == [True] * 8 + [False, True, True, False]


def test_verify_never_stops_looking_and_always_never_stops() -> None:
    never, always = watch("never"), watch("always")
    for followed in (never, always):
        run(followed, range(3))
        run(followed, range(3))
    assert not never.must_look("a", 3) and always.must_look("a", 3)


def test_a_learned_timestep_counts_from_the_start_and_distrust_lasts() -> None:
    followed = watch("never")
    run(followed, range(3))
    run(followed, range(3))
    followed.note_learned()
    assert followed.must_look("a", 3)
    run(followed, range(3))
    run(followed, range(3))
    run(followed, range(1))
    assert not followed.must_look("a", 3)
    followed.distrust()
    assert followed.must_look("a", 3)
