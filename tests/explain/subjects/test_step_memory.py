"""What an explanation says of the memory that a compiled step takes at its highest point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fusion_compile as fc
from fusion_compile._program.memory.schedule import AliveThen, Peak, Schedule
from fusion_compile._program.program import CompiledRegion, Program
from fusion_compile.explain._subjects.step_memory import bytes_of, compiled_peaks

MIB = 2**20


def test_memory_counts_once_wherever_tensors_begin_in_it() -> None:
    whole = torch.zeros(1000)
    inside = torch.from_dlpack(whole[100:300])  # type: ignore[attr-defined]  # a storage of its own over a part of it
    assert inside.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    assert bytes_of([inside, whole[500:], whole, torch.zeros(10)]) == 4040
    assert bytes_of([]) == 0


@pytest.fixture
def explanation(monkeypatch: pytest.MonkeyPatch) -> fc.Explanation:
    """Of a step whose program takes 3 MiB, in twelve pieces."""
    alive = (
        AliveThen("cpp_fused_gelu_1", 2 * MIB, (512, 1024), "float32"),
        AliveThen("", MIB // 2, (1024, 128), "float32"),
    )
    small = tuple(AliveThen("extern_kernels.mm", MIB // 20, (64, 16), "float32") for _ in range(10))
    monkeypatch.setattr(Schedule, "peak", lambda self: Peak(3 * MIB, "cpp_fused_mean_2", (*alive, *small)))
    model = nn.Linear(512, 512, bias=False)
    step = fc.compile_training_step(
        model, lambda model, x: model(x).square().mean(), backend="aot_eager", optimizer="adamw", rehearse=False
    )
    step(torch.randn(2, 512))
    return fc.explain(step)


def test_the_report_says_what_is_kept_and_what_is_alive_besides(explanation: fc.Explanation) -> None:
    (peak,) = explanation.peaks
    weights_and_moments = 3 * 512 * 512 * 4
    assert peak.bytes - peak.kept_bytes == 3 * MIB
    assert weights_and_moments <= peak.kept_bytes < weights_and_moments + 1000  # and a few numbers
    assert (peak.program, peak.at) == ("step 0", "cpp_fused_mean_2")
    text = str(explanation)
    assert "Memory of step 0 as compiled, predicted" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "highest point, at cpp_fused_mean_2 6.00" in lines
    assert "of it kept between steps 3.00" in lines
    assert "float32 [512, 1024] of cpp_fused_gelu_1 2.00" in lines
    assert "float32 [1024, 128] 0.50" in lines
    assert "4 smaller 0.20" in lines


def test_it_is_in_the_json_and_in_the_page(explanation: fc.Explanation, tmp_path: Path) -> None:
    data = json.loads(json.dumps(explanation.to_json()))
    assert data["peaks"][0]["alive"][0] == {
        "name": "float32 [512, 1024] of cpp_fused_gelu_1",
        "bytes": 2 * MIB,
        "where": "",
    }
    assert fc.Explanation.from_json(data) == explanation
    explanation.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Memory of step 0 as compiled, predicted" in page


def test_a_program_in_regions_and_one_without_a_schedule_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, in_regions = (Program(fx.symbolic_trace(nn.Identity())) for _ in range(2))
    in_regions.compiled.append(CompiledRegion("block", 2, True, 3, ("forward",)))
    assert compiled_peaks({"one": alone}, []) == []
    monkeypatch.setattr(Schedule, "peak", lambda self: Peak(8, "", ()))
    assert [peak.program for peak in compiled_peaks({"one": alone, "other": in_regions}, [])] == ["one"]
