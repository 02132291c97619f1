"""fold_repeated_regions: equal blocks become calls of one region, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import count_regions, fold_repeated_regions, format_graph

WIDTH = 4


def trace(fn: Callable[..., object], *inputs: Any) -> fx.GraphModule:
    graph_module = make_fx(fn, tracing_mode="fake")(*inputs)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def region(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The first region that was folded."""
    found = graph_module.region_0
    assert isinstance(found, fx.GraphModule)
    return found


def block(x: Tensor, w: Tensor, scale: float = 0.5) -> Tensor:
    """Nine kernels."""
    h = torch.tanh(x @ w) * scale
    return x + torch.sigmoid(h.exp() + h.cos()).sin()


def other_block(x: Tensor, w: Tensor) -> Tensor:
    """Ten kernels, none in the order of `block`'s."""
    h = (x.cos() @ w).sin().exp()
    return torch.relu(h + x).abs().neg().sigmoid() - x


X = torch.randn(3, WIDTH)
WEIGHTS = tuple(torch.randn(WIDTH, WIDTH) for _ in range(6))
REPEATED = {"region_0": 6}


def stack(x: Tensor, *weights: Tensor) -> Tensor:
    for w in weights:
        x = block(x, w)
    return x


def assert_folds(fn: Callable[..., Any], *inputs: Tensor, regions: dict[str, int]) -> fx.GraphModule:
    """`fn` folds to `regions`, gives the same bits, and folds no further."""
    graph_module = trace(fn, *inputs)
    report = fold_repeated_regions(graph_module)
    assert count_regions(graph_module) == regions and report.changed == sum(regions.values())
    assert report.exact and not report.bytes_added
    got, want = graph_module(*inputs), fn(*inputs)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True):
        assert torch.equal(a, b)
    text = format_graph(graph_module.graph)
    assert fold_repeated_regions(graph_module).changed == 0
    assert format_graph(graph_module.graph) == text
    return graph_module


def test_applied() -> None:
    graph_module = assert_folds(stack, X, *WEIGHTS[:3], regions={"region_0": 3})
    assert_expected_inline(
        format_graph(graph_module.graph),
        """\
arg0_1: float32[3, 4] = input
arg1_1: float32[4, 4] = input
arg2_1: float32[4, 4] = input
arg3_1: float32[4, 4] = input
region_0: ? = region_0
invoke_subgraph: (float32[3, 4]) = invoke_subgraph(region_0, region_0, arg0_1, arg1_1)
getitem: float32[3, 4] = getitem(invoke_subgraph, 0)
region_1: ? = region_0
invoke_subgraph_1: (float32[3, 4]) = invoke_subgraph(region_1, region_0, getitem, arg2_1)
getitem_1: float32[3, 4] = getitem(invoke_subgraph_1, 0)
region_2: ? = region_0
invoke_subgraph_2: (float32[3, 4]) = invoke_subgraph(region_2, region_0, getitem_1, arg3_1)
getitem_2: float32[3, 4] = getitem(invoke_subgraph_2, 0)
return getitem_2""",
    )
    region = graph_module.region_0
    assert isinstance(region, fx.GraphModule)
    assert_expected_inline(
        format_graph(region.graph),
        """\
input_0: float32[3, 4] = input
input_1: float32[4, 4] = input
mm: float32[3, 4] = aten.mm.default(input_0, input_1)
tanh: float32[3, 4] = aten.tanh.default(mm)
mul: float32[3, 4] = aten.mul.Tensor(tanh, 0.5)
exp: float32[3, 4] = aten.exp.default(mul)
cos: float32[3, 4] = aten.cos.default(mul)
add: float32[3, 4] = aten.add.Tensor(exp, cos)
sigmoid: float32[3, 4] = aten.sigmoid.default(add)
sin: float32[3, 4] = aten.sin.default(sigmoid)
add_1: float32[3, 4] = aten.add.Tensor(input_0, sin)
return [add_1]""",
    )


def test_absent_when_nothing_repeats() -> None:
    assert_folds(lambda x, w: other_block(block(x, w), w), X, WEIGHTS[0], regions={})


def test_two_kinds_one_after_the_other() -> None:
    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights[:3]:
            x = block(x, w)
        for w in weights[3:]:
            x = other_block(x, w)
        return x

    assert_folds(fn, X, *WEIGHTS, regions={"region_0": 3, "region_1": 3})


@pytest.mark.parametrize(
    ("pattern", "regions"),
    [("ABABABAB", {"region_0": 4}), ("AABABBA", {"region_0": 4, "region_1": 3})],
    ids=["in turn", "without a period"],
)
def test_two_kinds_mixed(pattern: str, regions: dict[str, int]) -> None:
    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for kind, w in zip(pattern, (*weights, *weights), strict=False):
            x = block(x, w) if kind == "A" else other_block(x, w)
        return x

    assert_folds(fn, X, *WEIGHTS, regions=regions)


def test_a_constant_of_its_own_stays_outside() -> None:
    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for i, w in enumerate(weights):
            x = block(x, w) * (0.5 + i)
        return x

    graph_module = assert_folds(fn, X, *WEIGHTS, regions=REPEATED)
    assert format_graph(graph_module.graph).count("aten.mul.Tensor(") == len(WEIGHTS)


def test_equal_operators_with_other_wiring_are_another_region() -> None:
    def crossed(x: Tensor, w: Tensor) -> Tensor:
        h = torch.tanh(x @ w) * 0.5
        return h + torch.sigmoid(h.exp() + h.cos()).sin()  # adds h where `block` adds x

    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights[:3]:
            x = crossed(block(x, w).neg(), w).neg()
        return x

    assert_folds(fn, X, *WEIGHTS, regions={"region_0": 3, "region_1": 3})


def test_other_shapes_and_strides_are_not_folded() -> None:
    def fn(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return block(x, w), block(y, w), block(x.t().contiguous().t(), w)

    assert_folds(fn, X, torch.randn(2, WIDTH), WEIGHTS[0], regions={})


def test_random_calls_stay_outside() -> None:
    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = F.dropout(block(x, w))
        return x

    graph_module = trace(fn, X, *WEIGHTS)
    fold_repeated_regions(graph_module)
    assert count_regions(graph_module) == REPEATED
    assert "dropout" not in format_graph(region(graph_module).graph)


def test_attention_without_dropout_is_folded() -> None:
    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = F.scaled_dot_product_attention(block(x, w)[None], x[None], x[None])[0]
        return x

    graph_module = assert_folds(fn, X, *WEIGHTS, regions=REPEATED)
    assert "attention" not in format_graph(graph_module.graph)


def test_views_that_leave_a_region_are_taken_outside() -> None:
    """A region's results must have memory of their own, not that of an input or of each other."""

    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for i, w in enumerate(weights):
            a, b = block(x, w).split(2, dim=1)
            x = torch.cat([a * (i + 0.5), b], dim=1)  # the factor differs, so a region ends with a and b
        return x

    graph_module = assert_folds(fn, X, *WEIGHTS, regions=REPEATED)
    inputs = [torch.randn(node.meta["val"].shape) for node in region(graph_module).graph.find_nodes(op="placeholder")]
    memory = [t.untyped_storage().data_ptr() for t in (*inputs, *region(graph_module)(*inputs))]
    assert len(set(memory)) == len(memory)


def test_reshapes_alone_are_no_region() -> None:
    """Each may be a view, and would be taken outside again, for ever."""

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.aten.reshape.default(part, [-1]) for part in x.unbind())

    graph_module = make_fx(fn, tracing_mode="fake", pre_dispatch=True)(torch.randn(40, 2, 2))
    assert "aten.reshape" in format_graph(graph_module.graph)
    assert fold_repeated_regions(graph_module).changed == 0


def test_values_beside_the_stream_pass_through() -> None:
    """Skip connections: later blocks read what earlier ones gave, and some results nobody reads."""

    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        seen = []
        for w in weights[:3]:
            seen.append(x := block(x, w))
        for w in weights[3:]:
            x = block(x + seen.pop(), w)
        return x

    assert_folds(fn, X, *WEIGHTS, regions={"region_0": 6})
