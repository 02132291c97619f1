"""split_concatenations: parts of what was joined are read where they came from, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import BindingTime, binding_times, drop_metadata_reads, format_graph, split_concatenations

TEXT, IMAGE, PLACE = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(1, 8, 4)


def trace(fn: Callable[..., object], *inputs: Tensor, mode: Literal["fake", "symbolic"] = "fake") -> fx.GraphModule:
    graph_module = make_fx(fn, tracing_mode=mode)(*inputs)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def check(fn: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, changed: int) -> fx.GraphModule:
    """`changed` places of `fn` are rewritten, once; the numbers are the same."""
    graph_module = trace(fn, *inputs)
    report = split_concatenations(graph_module)
    graph_module.graph.lint()
    assert report.changed == changed and report.exact
    for got, want in zip(graph_module(*inputs), fn(*inputs), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype and got.shape == want.shape
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
    text = format_graph(graph_module.graph)
    assert split_concatenations(graph_module).changed == 0
    assert format_graph(graph_module.graph) == text
    return graph_module


def operators(graph_module: fx.GraphModule) -> list[str]:
    return sorted(n.target.__name__ for n in graph_module.graph.nodes if n.op == "call_function")


def positions(text: Tensor, image: Tensor, place: Tensor) -> tuple[Tensor, ...]:
    both = torch.cat([text, image], dim=1) + place
    return both[:, :3], both[:, 3:]


def test_applied() -> None:
    graph_module = check(positions, TEXT, IMAGE, PLACE, changed=4)
    assert_expected_inline(
        format_graph(graph_module.graph),
        """\
text_1: float32[2, 3, 4] = input
image_1: float32[2, 5, 4] = input
place_1: float32[1, 8, 4] = input
slice_tensor_1: float32[1, 3, 4] = aten.slice.Tensor(place_1, 1, 0, 3)
add_tensor: float32[2, 3, 4] = aten.add.Tensor(text_1, slice_tensor_1)
slice_tensor_3: float32[1, 5, 4] = aten.slice.Tensor(place_1, 1, 3, 8)
add_tensor_1: float32[2, 5, 4] = aten.add.Tensor(image_1, slice_tensor_3)
return [add_tensor, add_tensor_1]""",
    )


def results(graph_module: fx.GraphModule) -> list[fx.Node]:
    return graph_module.graph.output_node().all_input_nodes


def test_the_text_no_longer_depends_on_the_image() -> None:
    graph_module = trace(positions, TEXT, IMAGE, PLACE)
    roles = {"text_1": BindingTime.REQUEST, "image_1": BindingTime.LIVE}
    text, image = results(graph_module)
    assert binding_times(graph_module.graph, roles)[text] is BindingTime.LIVE
    split_concatenations(graph_module)
    text, image = results(graph_module)
    times = binding_times(graph_module.graph, roles)
    assert times[text] is BindingTime.REQUEST and times[image] is BindingTime.LIVE


def test_absent() -> None:
    check(lambda a, b: (torch.cat([a, b], dim=1).sin(), a[:, 1:]), TEXT, IMAGE, changed=0)


@pytest.mark.parametrize(
    "take",
    [torch.split, torch.Tensor.split_with_sizes, torch.Tensor.narrow],
    ids=["split", "split_with_sizes", "narrow"],
)
def test_splits_are_parts(take: Callable[..., Any]) -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        both = torch.cat([a, b], dim=1)
        if take is torch.Tensor.narrow:
            return both.narrow(1, 0, 3) * 2, both.narrow(1, 3, 5) * 3
        x, y = take(both, [3, 5], dim=1)
        return x * 2, y * 3

    graph_module = check(fn, TEXT, IMAGE, changed=2)
    assert operators(graph_module) == ["mul.Tensor", "mul.Tensor"]


def test_a_part_of_one_operand_is_a_slice_of_it() -> None:
    graph_module = check(lambda a, b: (torch.cat([a, b], dim=1)[:, 4:-1] * 2,), TEXT, IMAGE, changed=1)
    assert "aten.slice.Tensor(b_1, 1, 1, 4)" in format_graph(graph_module.graph)


def test_several_whole_operands_are_joined_again() -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        joined = torch.cat([a, a, b], dim=1)
        return joined[:, :6] * 2, joined[:, 6:] * 2

    graph_module = check(fn, TEXT, IMAGE, changed=2)
    assert "aten.cat.default([a_1, a_1], 1)" in format_graph(graph_module.graph)


def test_what_other_readers_need_whole_is_not_joined_twice() -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        joined = torch.cat([a, a, b], dim=1)
        return joined[:, :6] * 2, joined.sin()

    check(fn, TEXT, IMAGE, changed=0)


def test_cut_operands_are_declined_with_a_reason() -> None:
    graph_module = trace(lambda a, b: torch.cat([a, b], dim=1)[:, 1:5] * 2, TEXT, IMAGE)
    report = split_concatenations(graph_module)
    assert report.changed == 0
    (declined,) = report.declined
    assert "cut an operand" in declined.reason


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b, p: ((both := torch.cat([a, b], dim=1) + p)[:, :4], both[:, 3:]),  # entry 3 would be added twice
        lambda a, b, p: ((both := torch.cat([a, b], dim=1) + p)[:, :3], both.sin()),  # all of it is needed anyway
        lambda a, b, p: (torch.exp(torch.cat([a, b], dim=1))[:, :3],),  # may round otherwise
        lambda a, b, p: ((p + 1)[:, :3],),  # nothing was joined
        lambda a, b, p: (torch.cat([a, b], dim=1)[:, ::2] * 2, torch.cat([a, b], dim=1)[:, :, :2] * 2),
    ],
    ids=["overlap", "whole", "transcendental", "no concatenation", "another step or dimension"],
)
def test_left_alone(fn: Callable[..., tuple[Tensor, ...]]) -> None:
    check(fn, TEXT, IMAGE, PLACE, changed=0)


def test_broadcast_operands_are_cut_where_they_are_long() -> None:
    def fn(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        both = (torch.cat([a, b], dim=1) * a[:, :1] - p[0]).to(torch.float64).clone() / a[0, 0]
        return both[:, :3], both[:, 3:]

    graph_module = check(fn, TEXT, IMAGE, PLACE, changed=12)
    assert "cat.default" not in operators(graph_module)


def test_all_parts_in_order_are_the_whole() -> None:
    def fn(a: Tensor) -> tuple[Tensor, ...]:
        h = a.sin()
        x, y = h.split([1, 2], dim=1)
        return (torch.cat([x, y], dim=1).cos(), torch.cat([h[..., :2], h[..., 2:3], h[..., 3:]], dim=-1).exp())

    graph_module = check(fn, TEXT, changed=2)
    assert operators(graph_module) == ["cos.default", "exp.default", "sin.default"]


def test_parts_out_of_order_are_not_the_whole() -> None:
    def fn(a: Tensor) -> tuple[Tensor, ...]:
        x, y, z = a.unbind(0)[0].split(1, dim=0)
        return torch.cat([y, x, z]), torch.cat([x, y]), torch.cat([x, y, y])

    check(fn, TEXT, changed=0)


def test_joined_through_blocks_stays_joined() -> None:
    """Taken apart and joined again at every block: one tensor all along, not two."""

    def fn(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        for _ in range(3):
            both = torch.cat([a, b], dim=1)
            both = both + both.tanh() * p
            a, b = both[:, :3], both[:, 3:]
        return (b,)

    graph_module = check(fn, TEXT, IMAGE, PLACE, changed=3)  # two are joined again; the last is added in part alone
    assert operators(graph_module).count("cat.default") == 1 and operators(graph_module).count("add.Tensor") == 3


def test_symbolic_sizes_are_left_alone() -> None:
    graph_module = trace(positions, TEXT, IMAGE, PLACE, mode="symbolic")
    assert split_concatenations(graph_module).changed == 0


def test_cogvideox_text_is_known_at_the_request() -> None:
    """Its patch embedding joins text and image, adds positions to both, and takes them apart."""
    torch.manual_seed(0)
    model: Any = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    )
    model.eval()
    inputs = (torch.randn(2, 2, 4, 8, 8), torch.randn(2, 6, 12), torch.tensor([5, 5]))
    with torch.no_grad():
        graph_module = torch.export.export(model, inputs, strict=False).run_decompositions({}).graph_module
    drop_metadata_reads(graph_module)
    graph = graph_module.graph
    names = [n.name for n in graph.find_nodes(op="placeholder")]
    roles = dict(zip(names[-3:], (BindingTime.LIVE, BindingTime.REQUEST, BindingTime.STEP), strict=True))
    before = binding_times(graph, roles)
    assert split_concatenations(graph_module).changed
    after = binding_times(graph, roles)

    def count(times: dict[fx.Node, BindingTime], time: BindingTime) -> int:
        return sum(1 for node, when in times.items() if when is time and node.op == "call_function")

    # without the pass only the projection is known: now the text with its positions, and its norm and modulation too
    assert (count(before, BindingTime.REQUEST), count(before, BindingTime.STEP_REQUEST)) == (1, 0)
    assert (count(after, BindingTime.REQUEST), count(after, BindingTime.STEP_REQUEST)) == (4, 2)
