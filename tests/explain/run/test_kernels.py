"""Kernels and fusion refusals, read from Inductor's records."""

from __future__ import annotations

from fusion_compile.explain._run.kernels import read_kernels, read_refusals
from fusion_compile.explain._run.listen import FusionLine, TraceRecord


def test_kernels_without_provenance_take_the_nodes_from_the_codes_comments() -> None:
    code = (
        "# Topologically Sorted Source Nodes: [mul, sin], Original ATen: [aten.mul, aten.sin]\n"
        "triton_poi_fused_mul_sin_0 = async_compile.triton('triton_poi_fused_mul_sin_0', '''\n"
        "def triton_poi_fused_mul_sin_0(in_ptr0): ...\n"
        "''', device_str='cuda')\n"
    )
    (kernel,) = read_kernels([TraceRecord("inductor_output_code", "0/0", {}, code)])
    assert kernel.name == "triton_poi_fused_mul_sin_0" and kernel.nodes == ("mul", "sin")
    assert "in_ptr0" in kernel.source


def test_a_refusal_is_named_by_the_graphs_nodes_and_told_once() -> None:
    text = "cannot fuse op3 with op7_op8: numel/rnumel mismatch (reduce) (128, 1),\n (64, 2)"
    line = FusionLine(text, ("relu",), ())
    (refusal,) = read_refusals([line, line])
    assert (refusal.first, refusal.second) == ("relu", "op7_op8")
    assert refusal.reason == "numel/rnumel mismatch (reduce) (128, 1), (64, 2)"
