"""What is private in torch does here what the package relies on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fusion_compile import _compat


def test_fake_tensors_are_of_a_trace_and_real_ones_are_not() -> None:
    with _compat.fake_mode() as mode:
        assert _compat.is_of_a_trace(mode.from_tensor(torch.ones(2)))
    assert not _compat.is_of_a_trace(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_write_stays_in_a_compiled_program(dtype: torch.dtype) -> None:
    """torch 2.13 drops a plain ``copy_`` into a 0-dim float64 input on the CPU."""
    state = torch.zeros((), dtype=dtype)

    def step(t: Tensor) -> None:
        _compat.write(t, t + 1)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(state)
    assert int(state) == 2


def test_a_parameter_that_the_graph_does_not_reach_is_told_from_other_errors() -> None:
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError) as missed:
        torch.autograd.grad((2 * a).sum(), [a, b])
    assert _compat.misses_a_parameter(missed.value) and not _compat.misses_a_parameter(RuntimeError("other"))


@pytest.mark.parametrize(
    ("own", "onednn", "wanted"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, True, torch.bfloat16),
        ({"architecture": "x86_64", "amx_bf16": True}, True, torch.bfloat16),
        ({"architecture": "x86_64", "avx512_bf16": False}, True, torch.float32),  # AVX-512 alone converts every entry
        ({"architecture": "x86_64", "avx512_bf16": True}, False, torch.float32),  # ONEDNN_MAX_CPU_ISA=AVX2
        ({"architecture": "aarch64"}, True, torch.bfloat16),
        ({"architecture": "aarch64"}, False, torch.float32),
    ],
)
def test_products_are_in_what_the_cpu_has_instructions_for(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, object], onednn: bool, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: own, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    assert _compat.fast_product_dtype("cpu") is wanted
    assert _compat.fast_product_dtype("meta") is torch.float32


def test_the_line_that_fixes_a_size_is_found() -> None:
    x = torch.zeros(5, 2)
    _compat.mark_symbolic([(x, 0)])
    with pytest.raises(Exception, match="specialized") as fixed:
        torch.compile(lambda t: t * (2 if t.shape[0] == 5 else 1), backend="eager", fullgraph=True)(x)
    assert "test_compat.py:" in _compat.where_a_size_is_fixed(fixed.value)
    assert _compat.where_a_size_is_fixed(RuntimeError("no frame.")) == "no frame"


def test_own_code_is_another_code_object_with_the_same_behaviour() -> None:
    offset = 3

    def add(x: int, *, more: int = 1) -> int:
        return x + offset + more

    copied = _compat.own_code(add)
    assert copied.__code__ is not add.__code__
    assert copied(1) == 5 and copied(1, more=2) == 6


def test_a_refusal_comes_out_of_dynamos_wrapping_and_other_errors_do_not() -> None:
    def refuse(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> None:
        raise ValueError("not this graph")

    compiled = torch.compile(
        lambda x: x + 1, backend=_compat.observed_backend("aot_eager", "default", refuse), fullgraph=True
    )
    with pytest.raises(Exception, match="not this graph") as caught:
        compiled(torch.ones(1))
    refusal = _compat.refusal_inside(caught.value)
    assert isinstance(refusal, ValueError) and str(refusal) == "not this graph"
    assert _compat.refusal_inside(ValueError("plain")) is None


def test_a_region_tags_the_nodes_that_are_traced_inside() -> None:
    seen: list[torch.fx.GraphModule] = []

    def fn(x: Tensor) -> Tensor:
        with _compat.region("forward"):
            y = x.sin()
        return y.cos()

    backend = _compat.observed_backend("eager", "default", lambda graph, inputs: seen.append(graph))
    torch.compile(fn, backend=backend, fullgraph=True)(torch.ones(2))
    tags = {n.name: (n.meta.get("custom") or {}).get("region") for n in seen[0].graph.nodes if n.op.startswith("call")}
    assert list(tags.values()) == ["forward", None]


def test_input_names_are_the_expressions_that_find_them() -> None:
    seen: list[torch.fx.GraphModule] = []
    backend = _compat.observed_backend("eager", "default", lambda graph, inputs: seen.append(graph))
    torch.compile(lambda state: state["a/b"] + 1, backend=backend, fullgraph=True)({"a/b": torch.ones(2)})
    (node,) = seen[0].graph.find_nodes(op="placeholder")
    assert _compat.input_source(node) == "L['state']['a/b']"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_grouped_product_has_its_kernels_shape_in_every_dtype(dtype: torch.dtype) -> None:
    tokens, experts = torch.randn(6, 8, dtype=dtype), torch.randn(2, 8, 16, dtype=dtype)
    offsets = torch.tensor([2, 6], dtype=torch.int32)
    real = torch.nn.functional.grouped_mm(tokens, experts, offs=offsets)
    with _compat.shapes_as_the_kernels_have_them(), _compat.fake_mode() as mode:
        fakes = [mode.from_tensor(t) for t in (tokens, experts, offsets)]
        fake = torch.nn.functional.grouped_mm(fakes[0], fakes[1], offs=fakes[2])
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_the_compilers_reason_is_its_first_line() -> None:
    def refusing(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        raise RuntimeError("it cannot.\nThe rest.")

    with pytest.raises(_compat.RefusedByCompiler) as caught:
        torch.compile(lambda x: x + 1, backend=refusing)(torch.ones(2))
    assert _compat.compilers_reason(caught.value) == "it cannot"


def test_every_registered_hook_counts() -> None:
    before = _compat.hooks_registered()
    nn.Tanh().register_forward_hook(lambda module, given, out: None)
    torch.ones(1, requires_grad=True).register_hook(lambda gradient: None)
    assert _compat.hooks_registered() == before + 2


LIKE_NOTHING: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "another shape": lambda: (torch.zeros(3, 2), torch.zeros(3)),
    "a transposed view": lambda: (torch.zeros(3, 2).t(), torch.zeros(3)),
    "another dtype": lambda: (torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64)),
    "another device": lambda: (torch.zeros(2, 3), torch.zeros(3, device="meta")),
    "a learnable one": lambda: (torch.zeros(2, 3), torch.zeros(3, requires_grad=True)),
    "one of another class": lambda: (torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(3), requires_grad=False)),
    "a sparse one": lambda: (torch.zeros(2, 3).to_sparse(), torch.zeros(3)),
    "one of inference mode": lambda: (torch.zeros(2, 3), _made_in_inference_mode()),
}


def _made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


@pytest.mark.parametrize("of_torch", [True, False], ids=["in C", "where torch has moved it"])
@pytest.mark.parametrize("others", LIKE_NOTHING)
def test_tensors_of_another_kind_are_told(others: str, of_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not of_torch:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    one = torch.zeros(3)
    are_alike = _compat.same_kinds([torch.zeros(2, 3), one])
    assert are_alike(torch.ones(2, 3), torch.ones(3)) and are_alike(torch.ones(2, 3), one)
    assert not are_alike(*LIKE_NOTHING[others]())
    assert not _compat.same_kinds([one, torch.ones(3)])(one, one)  # one tensor in two places
