"""Each way in which a generated program is not one CUDA graph without a wait has its own sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fusion_compile._gpu_program.generated import Generated, Partition
from fusion_compile._gpu_program.objections import objections

CODE = """
triton_poi_0 = async_compile.triton('triton_poi_0', '''
# tmp.item() and device(type='cpu') in a comment of a kernel
signature={'in_ptr0': '*fp32'}
''', device_str='cuda')

def partition_0(args):
    buf0 = empty_strided_cuda((4, ), (1, ), torch.float32)
    triton_poi_0.run(arg0_1, buf0, 4, stream=stream0)
    extern_kernels.mm(buf0, arg1_1, out=buf1)  # x.cpu()

class Runner:
    def call(self, args):
        (buf1,) = self.partitions[0](args)
        return (buf1, )
"""
STATE = frozenset({"weight", "mu"})
HEALTHY = Generated([CODE], [Partition(("weight", "x", "mu"), STATE, STATE)], devices={"cuda"})


def test_a_healthy_program_has_no_objection() -> None:
    assert objections(HEALTHY, batch=["x"]) == []


def in_partition(line: str) -> list[str]:
    return [CODE.replace("    extern_kernels", f"    {line}\n    extern_kernels", 1)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"codes": [CODE, CODE]}, "Inductor made 2 graphs of the program and not one."),
        ({"skips": ["cpu device (x)", "cpu device (x)"]}, "no CUDA graph would be recorded: cpu device (x)."),
        ({"partitions": []}, "the program is cut into 0 CUDA graphs and not one."),
        ({"partitions": HEALTHY.partitions * 2}, "the program is cut into 2 CUDA graphs and not one."),
        ({"devices": {"cuda", "cpu"}}, "the program computes on cpu as well."),
        (
            {"codes": in_partition("n = buf0.item()")},
            "the program waits for the GPU or copies to the CPU: n = buf0.item()",
        ),
        (
            {"codes": in_partition("buf2 = empty_strided_cpu((), (), torch.float32)")},
            "the program waits for the GPU or copies to the CPU: buf2 = empty_strided_cpu((), (), torch.float32)",
        ),
        (
            {"codes": [CODE.replace("return (buf1, )", "triton_poi_0.run(buf1, 4)")]},
            "outside of the CUDA graph the program launches triton_poi_0.run.",
        ),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], sentence: str) -> None:
    assert objections(dataclasses.replace(HEALTHY, **changes), batch=["x"]) == [sentence]


def test_state_that_moves_is_named() -> None:
    moving = dataclasses.replace(HEALTHY, partitions=[Partition(("weight", "x", "mu"), frozenset({"mu"}), STATE)])
    assert objections(moving, batch=["x"]) == [
        "state that is written has no fixed address: weight.",
        "besides the batch, inputs are copied before every replay: weight.",
    ]
    assert objections(HEALTHY, batch=[]) == ["besides the batch, inputs are copied before every replay: x."]
    assert objections(HEALTHY, batch=None) == [], "where any input may be copied"


def test_a_program_without_a_cuda_graph_owes_the_rest() -> None:
    plain = dataclasses.replace(
        HEALTHY, partitions=[], codes=[CODE.replace("return (buf1, )", "triton_poi_0.run(buf1)")]
    )
    assert objections(plain, batch=None, recorded=False) == []
    waits = dataclasses.replace(plain, codes=in_partition("torch.ops.aten._local_scalar_dense.default(buf0)"))
    assert len(objections(waits, batch=None, recorded=False)) == 1
