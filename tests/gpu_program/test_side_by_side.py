"""Of kernels in one launch none may write what another reads; parts of a bank may lie side by side in it."""

from __future__ import annotations

import pytest

from fusion_compile._gpu_program.side_by_side import collisions

TOGETHER = """
triton_poi_0 = async_compile.triton('triton_poi_0', '''
    inductor_meta={'combo_grid_meta': {'num_kernels': 2}}
def triton_poi_0(in_out_ptr0, in_ptr0, in_ptr1, out_ptr0, out_ptr1, XBLOCK : tl.constexpr):
    pid = tl.program_id(0)
    if pid < num_xblocks_0:
        tmp0 = tl.load(in_ptr0 + (x0), xmask)
        tl.store(out_ptr0 + (x0), tmp0, xmask)
    elif pid < num_xblocks_1:
        tmp1 = tl.load(in_ptr1 + (x0), xmask)
        tmp2 = tl.load(in_out_ptr0 + (x0), xmask)
        tl.store(in_out_ptr0 + (x0), tmp2, xmask)
        tl.store(out_ptr1 + (x0), tmp1, xmask)
    else:
        pass
''', device_str='cuda')

def call(args):
    buf0 = empty_strided_cuda((4, ), (1, ), torch.float32)
    buf9 = buf0; del buf0  # reuse
    buf5 = reinterpret_tensor(buf4, (4, ), (1, ), 0)  # alias
    buf6 = reinterpret_tensor(buf4, (4, ), (1, ), 4)  # alias
    triton_poi_0.run(GIVEN, stream=stream0)
"""


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("arg0_1, buf1, buf2, buf5, buf6", []),  # two parts of buf4
        ("arg0_1, buf1, reinterpret_tensor(buf2, (4, ), (1, ), 0), buf3, buf5", []),
        ("arg0_1, buf1, buf3, buf3, buf5", [("buf3", "buf3")]),
        ("arg0_1, buf1, buf9, buf0, buf5", [("buf0", "buf9")]),  # two names
        ("arg0_1, buf1, reinterpret_tensor(buf4, (4, ), (1, ), 0), buf5, buf3", [("buf5", "reinterpret_tensor(buf4")]),
        ("buf1, buf1, buf2, buf3, buf5", [("buf1", "buf1")]),  # in place, while the other reads
        ("buf3, buf1, buf2, buf3, buf5", [("buf3", "buf3")]),
    ],
)
def test_a_launch_in_which_one_writes_what_another_uses_is_said(given: str, wrong: list[tuple[str, str]]) -> None:
    said = collisions(TOGETHER.replace("GIVEN", given))
    assert len(said) >= len(wrong) and bool(said) == bool(wrong), said
    for written, used in wrong:
        assert any(f"one writes {written}, and another uses {used}" in sentence for sentence in said), said
    assert all(sentence.startswith("triton_poi_0: ") for sentence in said)


def test_kernels_of_their_own_are_not_compared() -> None:
    assert collisions(TOGETHER.replace("combo_grid_meta", "grid_meta").replace("GIVEN", "buf1, buf1, b, b, c")) == []
