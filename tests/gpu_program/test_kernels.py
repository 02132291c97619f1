"""Kernels are found in a program's text, compiled once each, and what does not compile is said by name."""

from __future__ import annotations

from fusion_compile._gpu_program.kernels import Compilation, Compiled, Kernel, Totals, kernels_of


def text(*kernels: tuple[str, str]) -> str:
    """A program with these kernels, by name and body."""
    defined = "".join(
        f"{name} = async_compile.triton('{name}', '''\ndef {name}(x):\n    {body}\n''', device_str='cuda')\n\n"
        for name, body in kernels
    )
    return f"async_compile = AsyncCompile()\n{defined}def call(args):\n    pass\n"


def test_every_kernel_is_found_once_whatever_its_running_number() -> None:
    first = text(("triton_poi_fused_add_3", "x + 1"), ("triton_poi_fused_mul_4", "x * 2"))
    second = text(("triton_poi_fused_add_7", "x + 1"), ("triton_poi_fused_mul_8", "x * 3"))
    found = kernels_of([first, second])
    assert [k.name for k in found] == ["triton_poi_fused_add_7", "triton_poi_fused_mul_4", "triton_poi_fused_mul_8"]
    assert "x * 3" in found[2].source


def test_a_compilation_counts_keeps_the_worst_and_compiles_nothing_twice() -> None:
    asked: list[tuple[str, int]] = []

    def compiler(kernel: Kernel, architecture: int) -> list[Compiled]:
        asked.append((kernel.name, architecture))
        if "* 3" in kernel.source and architecture == 100:
            return [Compiled("warps 1", 8, 0, 0), Compiled("warps 2", 0, 0, 0, error="operand #0 does not dominate")]
        return [Compiled("warps 1", 40, 16 if "* 2" in kernel.source else 0, 1024)]

    compilation = Compilation((90, 100), compiler)
    fine = kernels_of([text(("triton_a_1", "x + 1"), ("triton_b_2", "x * 2"))])
    assert compilation.add(fine) == []
    assert compilation.add(fine) == [] and len(asked) == 4
    assert compilation.totals() == Totals(2, 4, 40, 1024, ("triton_b_2",))
    assert compilation.totals(fine[:1]) == Totals(1, 2, 40, 1024, ())
    assert str(compilation.totals()).endswith(
        "at most 40 registers and 1024 bytes of shared memory, 1 with local memory"
    )

    broken = kernels_of([text(("triton_c_0", "x * 3"))])
    sentence = "triton_c_0 does not compile for sm_100 (warps 2): operand #0 does not dominate"
    assert compilation.add(broken) == [sentence]
    assert compilation.add(broken) == [sentence], "a program that shares a broken kernel is broken, too"
    assert compilation.totals(broken).binaries == 2
