"""Reports as text."""

from __future__ import annotations

import dataclasses

from expecttest import assert_expected_inline

from fusion_compile._sampler.report import ProgramReport, RankReport, SamplerReport
from fusion_compile.passes import Declined

REPORT = ProgramReport(
    model="DiT",
    inputs=("x float32[2, 4] cpu", "t float32[2] cpu"),
    roles="x=live (guessed), t=step",
    n_steps=40,
    mode="default",
    rows="exact",
    nodes={"step": 5, "live": 7},
    body_nodes=8,
    launches=(10, 6),
    parameters={"table": 30, "prologue": 0, "body": 70, "unread": 0},
    weight_bytes={"table": 2**20, "prologue": 0, "body": 2**21, "unread": 0},
    residuals=3,
    table_bytes=2**19,
    byte_budget="automatic",
    declined=(Declined("linear", "linear: it is large."),),
)


def test_a_program_is_reported_line_by_line() -> None:
    assert_expected_inline(
        str(REPORT),
        """\
sampler of DiT, 40 steps, mode 'default', exact
  inputs      x float32[2, 4] cpu; t float32[2] cpu
  roles       x=live (guessed), t=step
  calls       step 5, live 7
  hoisted     12 calls -> 8 in the loop; kernels when run eagerly 10 -> 6
  table       3 values in packed rows, 0.50 MiB for one request; budget automatic
  table       30 parameters (30.0%), 1.00 MiB: read once per schedule
  prologue    0 parameters (0.0%), 0.00 MiB: read once per request
  body        70 parameters (70.0%), 2.00 MiB: read at every step
  declined    linear: linear: it is large.""",
    )


def test_what_only_a_run_knows_has_lines_of_its_own() -> None:
    report = dataclasses.replace(
        REPORT,
        rows="approximate",
        rank=RankReport(4, 2, 2**20, 2**18, 0, 1, 0.0123),
        regions={"region_0": 3, "region_1": 1},
        replay="the loop's body is one CUDA graph",
        measured_difference=1e-6,
        released=2**20,
        declined=(),
    )
    *_, rank, regions, replay, difference, released, declined = str(report).splitlines()
    assert rank == (
        "  rank        4: 2 layers read 0.25 MiB of factors, not 1.00 MiB of weights; t in [0, 1], each within 0.012 "
        "of its norm between the samples"
    )
    assert regions == "  repeated    2 blocks compiled once each, called 3, 1 times a step"
    assert replay == "  replay      the loop's body is one CUDA graph"
    assert difference == "  difference  batched rows are within 1e-06 of single steps"
    assert released == "  released    1.00 MiB" and declined == "  declined    nothing"


def test_a_sampler_reports_every_program_and_before_the_first_that_nothing_is_known() -> None:
    assert str(SamplerReport("DiT", 40, ())) == "sampler of DiT, 40 steps: not called yet, nothing is known"
    assert str(SamplerReport("DiT", 40, (REPORT, REPORT))) == f"{REPORT}\n{REPORT}"
