"""On a GPU a bank of gradients begins with its first gradient, also in a program that is written without one."""

from __future__ import annotations

from fusion_compile._gpu_program._compat import H100, captured_for
from fusion_compile._program.memory import banks_first


def test_a_gpu_has_its_banks_first_and_a_cpu_has_not() -> None:
    assert banks_first.banks_first("cuda")
    assert not banks_first.banks_first("cpu")
    with captured_for(H100):
        assert banks_first.banks_first("cpu")
    assert not banks_first.banks_first("cpu")
