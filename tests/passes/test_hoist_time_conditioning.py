"""hoist_time_conditioning and its packed rows: a graph is split by binding time, and the parts give what the whole
gave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import (
    BindingTime,
    Exchange,
    Hoisted,
    format_graph,
    hoist_time_conditioning,
)

STEP, REQUEST, LIVE = BindingTime.STEP, BindingTime.REQUEST, BindingTime.LIVE
ROLES = {"t_1": STEP, "y_1": REQUEST, "x_1": LIVE}


def trace(fn: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    graph_module = make_fx(fn, tracing_mode="fake")(*inputs)
    graph_module.graph.eliminate_dead_code()
    return graph_module


def modulated(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    shift, scale = (t.sin() @ w).chunk(2, dim=-1)
    return x * (1 + scale) + shift


def labelled(x: Tensor, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (x + y.exp()) * torch.tanh(t.sin() + y.exp()) + t.sin() @ w


def run(hoisted: Hoisted, values: dict[str, Tensor]) -> tuple[Tensor, ...] | Tensor:
    """Stages in order, then the body, unpacked."""
    known = dict(values)
    for stage in hoisted.stages.values():
        known.update(zip(stage.outputs, stage.graph_module(*(known[n] for n in stage.inputs)), strict=True))
    return hoisted.body.graph_module(*(known[n] for n in hoisted.body.inputs))


X, T, Y, W = torch.randn(2, 4), torch.randn(2, 8), torch.randn(2, 4), torch.randn(8, 8)


def test_applied() -> None:
    hoisted = hoist_time_conditioning(trace(modulated, X, T, W), {"x_1": LIVE, "t_1": STEP}, n_steps=4)
    assert_expected_inline(
        format_graph(hoisted.stages[STEP].graph_module.graph),
        """\
t_1: float32[2, 8] = input
w_1: float32[8, 8] = input
sin: float32[2, 8] = aten.sin.default(t_1)
mm: float32[2, 8] = aten.mm.default(sin, w_1)
split: (float32[2, 4], float32[2, 4]) = aten.split.Tensor(mm, 4, -1)
getitem: float32[2, 4] = getitem(split, 0)
getitem_1: float32[2, 4] = getitem(split, 1)
add: float32[2, 4] = aten.add.Tensor(getitem_1, 1)
return [getitem, add]""",
    )
    assert_expected_inline(
        format_graph(hoisted.body.graph_module.graph),
        """\
x_1: float32[2, 4] = input
getitem: float32[2, 4] = input
add: float32[2, 4] = input
mul: float32[2, 4] = aten.mul.Tensor(x_1, add)
add_1: float32[2, 4] = aten.add.Tensor(mul, getitem)
return add_1""",
    )


def test_absent_when_nothing_depends_on_the_step_alone() -> None:
    hoisted = hoist_time_conditioning(trace(lambda x, t: x * t, X, Y), {"x_1": LIVE, "t_1": LIVE}, n_steps=4)
    assert not hoisted.stages and not hoisted.residuals
    assert hoisted.report.changed == 0 and hoisted.report.bytes_added == 0


def test_numbers_are_bitwise_equal() -> None:
    graph_module = trace(labelled, X, T[:, :4], Y, W[:4, :4])
    values = {"x_1": X, "t_1": T[:, :4], "y_1": Y, "w_1": W[:4, :4]}
    hoisted = hoist_time_conditioning(graph_module, ROLES, n_steps=4)
    assert set(hoisted.stages) == {STEP, REQUEST, BindingTime.STEP_REQUEST}
    assert torch.equal(run(hoisted, values), graph_module(*values.values()))  # type: ignore[arg-type]


def test_several_users_read_one_residual() -> None:
    def fn(x: Tensor, t: Tensor) -> Tensor:
        s = t.sin().exp()
        return (x * s).cos() + x * s.unsqueeze(0)[0] - s.view(-1).view(2, 4)

    hoisted = hoist_time_conditioning(trace(fn, X, Y), {"x_1": LIVE, "t_1": STEP}, n_steps=4)
    assert list(hoisted.residuals) == ["exp"]


def test_a_step_that_the_body_reads_itself_is_a_residual() -> None:
    hoisted = hoist_time_conditioning(trace(lambda x, t: x * t, X, Y), {"x_1": LIVE, "t_1": STEP}, n_steps=4)
    assert hoisted.residuals == {"t_1": STEP}
    assert hoisted.stages[STEP].outputs == ("t_1",)


def test_declines_what_costs_more_to_read_than_to_compute() -> None:
    t = torch.randn(1, 1)
    wide = torch.randn(1, 4096)
    graph_module = trace(lambda x, t, wide: x + t.sin() * wide, torch.randn(4096, 4096), t, wide)
    hoisted = hoist_time_conditioning(
        graph_module, {"x_1": LIVE, "t_1": STEP}, n_steps=4, exchange=Exchange(bytes_per_launch=64, flops_per_byte=8)
    )
    assert list(hoisted.residuals) == ["sin"]
    assert_expected_inline(
        "\n".join(d.reason for d in hoisted.report.declined),
        """mul: reading its 16.0 KiB at every step costs more than computing it again.""",
    )


def test_declines_what_does_not_fit_the_budget_and_says_so() -> None:
    def fn(x: Tensor, t: Tensor, small: Tensor, large: Tensor) -> Tensor:
        return x * (t @ small).sum() + t.sin() @ large

    inputs = torch.randn(4, 1024), torch.randn(4, 8), torch.randn(8, 8), torch.randn(8, 1024)
    roles = {"x_1": LIVE, "t_1": STEP}
    hoisted = hoist_time_conditioning(trace(fn, *inputs), roles, n_steps=8, byte_budget=4096)
    assert hoisted.report.bytes_added <= 4096
    (declined,) = hoisted.report.declined
    assert_expected_inline(
        declined.reason.partition(" and this")[0], """mm: 8 rows of it take 128.0 KiB; the table's budget is 4.0 KiB"""
    )
    assert not hoist_time_conditioning(trace(fn, *inputs), roles, n_steps=8).report.declined


def test_a_budget_holds_for_a_table_smaller_than_the_weights_it_releases() -> None:
    def fn(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return x + t.sin() @ w

    inputs = torch.randn(1, 1024), torch.randn(1, 8), torch.randn(8, 1024)
    graph, roles = trace(fn, *inputs), {"x_1": LIVE, "t_1": STEP}
    assert hoist_time_conditioning(graph, roles, n_steps=2, byte_budget=8192).residuals == {"mm": STEP}
    tight = hoist_time_conditioning(graph, roles, n_steps=2, byte_budget=8191)
    assert tight.report.bytes_added == 2 * 8 * 4
    assert [d.node for d in tight.report.declined] == ["mm"]


def test_declines_a_tensor_whose_size_depends_on_data() -> None:
    class Packed(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            return x * t.sin() + x[:, torch.nonzero(mask).flatten()].sum()

    exported = torch.export.export(Packed(), (X, T[:, :4], torch.ones(4)), strict=False).run_decompositions({})
    roles = {"x": LIVE, "t": STEP, "mask": REQUEST}
    hoisted = hoist_time_conditioning(exported.graph_module, roles, n_steps=4)
    assert [d.reason for d in hoisted.report.declined] == [
        "nonzero gives a tensor whose size depends on data, so it runs at every step."
    ]
    assert hoisted.residuals == {"sin": STEP, "mask": REQUEST}


def test_each_stage_views_the_weights_it_reads_so_that_their_memory_can_go() -> None:
    def fn(x: Tensor, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return x + t.sin() @ w.mT + (y + t) @ w.mT

    inputs = X.repeat(1, 2), T, T, W
    hoisted = hoist_time_conditioning(trace(fn, *inputs), ROLES, n_steps=4)
    assert BindingTime.CONST not in hoisted.stages
    assert all("w_1" in stage.inputs for stage in hoisted.stages.values())
    values = dict(zip(("x_1", "t_1", "y_1", "w_1"), inputs, strict=True))
    assert torch.equal(run(hoisted, values), fn(*inputs))  # type: ignore[arg-type]


def test_declines_random_numbers_which_stay_in_the_body() -> None:
    hoisted = hoist_time_conditioning(
        trace(lambda x, t: x + torch.rand_like(t), X, Y), {"x_1": LIVE, "t_1": STEP}, n_steps=4
    )
    assert_expected_inline(
        "\n".join(d.reason for d in hoisted.report.declined),
        """rand_like draws random numbers, so it runs at every step.""",
    )


def test_roles_of_unknown_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="no inputs of the graph"):
        hoist_time_conditioning(trace(modulated, X, T, W), {"nobody": LIVE}, n_steps=4)
