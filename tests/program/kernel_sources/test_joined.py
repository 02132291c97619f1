"""C++ kernels, each written as a file of its own -> a few files that hold all of them."""

from __future__ import annotations

import pytest

from fusion_compile._program.kernel_sources.joined import Kernel, joined

HEAD = "\n#include <torch/csrc/inductor/cpp_prefix.h>\n"


def kernel(body: str, head: str = HEAD) -> Kernel:
    source = f'{head}extern "C"  void  kernel(const float* a, float* b)\n{{\n{body}\n}}\n'
    return Kernel(("const float*", "float*"), source)


def test_every_kernel_is_in_one_file_under_a_name_of_its_own() -> None:
    kernels = [kernel(f"b[0] = a[{n}];") for n in range(29)]
    files = joined(kernels, most=12)
    assert [len(file.kernels) for file in files] == [10, 10, 9]
    assert sorted(n for file in files for n in file.at) == list(range(29))
    for file in files:
        source = file.source()
        assert source.count(HEAD.strip()) == 1, "what all include is there once"
        for at, name in zip(file.at, file.names(), strict=True):
            assert kernels[at].body.replace("kernel(", f"{name}(") in source
            assert source.count(f"void  {name}(") == 1


def test_the_longest_kernels_are_in_different_files() -> None:
    kernels = [kernel("b[0] += a[0];" * (200 if n < 2 else 1)) for n in range(6)]
    first, second = joined(kernels, most=3)
    assert {0, 1} == {first.at[0], second.at[0]}


def test_each_kernel_keeps_what_it_includes() -> None:
    other = "#include <other.h>\n#define N 3\n// a comment\n"
    (file,) = joined([kernel("b[0] = a[0];"), kernel("b[0] = N;", other)])
    assert file.source().startswith(HEAD) and other in file.source()
    assert file.source().index("#define N 3") < file.source().index("kernel_0")


@pytest.mark.parametrize(
    "body",
    ["#define TWICE 2\nb[0] = TWICE * a[0];", "kernel(a, b);", '} extern "C" void another() {'],
    ids=["a definition inside", "calls itself", "two functions"],
)
def test_what_is_not_one_function_is_left_alone(body: str) -> None:
    odd = kernel(body)
    assert not odd.can_be_joined()
    (file,) = joined([kernel("b[0] = a[0];"), odd, kernel("b[0] = a[1];")])
    assert sorted(file.at) == [0, 2]


def test_a_pragma_is_no_reason_to_leave_it_alone() -> None:
    assert kernel("#pragma omp parallel for\nfor (int n = 0; n < 3; n++) b[n] = a[n];").can_be_joined()


def test_a_kernel_by_itself_stays_by_itself() -> None:
    assert joined([kernel("b[0] = a[0];")]) == []
    assert joined([]) == []
