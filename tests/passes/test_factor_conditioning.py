"""factor_conditioning: layers of a conditioning vector become products with few coefficients, whatever their form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import BindingTime, Curve, Factored, Fit, factor_conditioning, format_graph
from tests.oracles import rank_conditioning as twin

ROLES = {"x_1": BindingTime.LIVE, "t_1": BindingTime.STEP, "y_1": BindingTime.REQUEST}
X, T, Y = torch.randn(2, 3, 40), torch.tensor([0.3, 0.6]), torch.randn(2, 24)
FREQUENCIES, W, B, V = torch.randn(1, 24), torch.randn(40, 24), torch.randn(40), torch.randn(24, 40)
SAMPLES = torch.linspace(0, 1, 50)


def trace(fn: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    graph_module = make_fx(fn, tracing_mode="fake")(*inputs)
    graph_module.graph.eliminate_dead_code()
    return graph_module


def by_svd(curve: Curve) -> Fit:
    """The twin's fit, at SAMPLES of the timestep."""

    def fit(*inputs: Tensor) -> list[Tensor]:
        known = dict(zip(curve.inputs, inputs, strict=True))

        def run(stage: Callable[..., object], names: tuple[str, ...], t: Tensor) -> list[Tensor]:
            return list(stage(*(t if n == curve.step_input else known[n] for n in names)))  # type: ignore[call-overload]

        points = [run(curve.source.graph_module, curve.source.inputs, t.expand(2))[0] for t in SAMPLES]
        mean, basis = twin.fit(torch.stack(points).double().reshape(-1, *curve.shape).numpy(), 4)
        out = [torch.from_numpy(mean).to(curve.dtype), torch.from_numpy(basis.copy()).to(curve.dtype)]
        for layer in curve.layers:
            matrix, *bias = run(layer.operands.graph_module, layer.operands.inputs, SAMPLES)
            matrix = matrix.double().T if layer.transposed else matrix.double()
            offset = torch.from_numpy(mean) @ matrix + (bias[0].double() if bias else 0)
            out += [(torch.from_numpy(basis.T.copy()) @ matrix).to(layer.dtype), offset.to(layer.dtype)]
        return out

    return fit


def factor(graph_module: fx.GraphModule, rank: int = 4) -> Factored:
    return factor_conditioning(graph_module, ROLES, rank=rank, covers=(0.0, 1.0), fit=by_svd)


def reasons(factored: Factored) -> str:
    return "\n".join(f"{d.node}: {d.reason}" for d in factored.report.declined)


def labelled(x: Tensor, t: Tensor, y: Tensor, f: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    c = torch.sin(t[:, None] @ f) + y
    return x * F.linear(F.silu(c), w, b)[:, None] + (F.silu(c) @ v)[:, None].tanh()


def of_time(x: Tensor, t: Tensor, f: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x + F.linear(torch.sin(t[:, None] @ f), w, b)[:, None]


def test_applied() -> None:
    graph_module = trace(of_time, X, T, FREQUENCIES, W, B)
    factored = factor(graph_module)
    assert_expected_inline(
        format_graph(graph_module.graph),
        """\
x_1: float32[2, 3, 40] = input
t_1: float32[2] = input
f_1: float32[1, 24] = input
w_1: float32[40, 24] = input
b_1: float32[40] = input
lt_scalar: bool[2] = aten.lt.Scalar(t_1, 0)
gt_scalar: bool[2] = aten.gt.Scalar(t_1, 1)
logical_or_default: bool[2] = aten.logical_or.default(lt_scalar, gt_scalar)
any_default: bool[] = aten.any.default(logical_or_default)
unsqueeze: float32[2, 1] = aten.unsqueeze.default(t_1, 1)
mm: float32[2, 24] = aten.mm.default(unsqueeze, f_1)
sin: float32[2, 24] = aten.sin.default(mm)
fit: (float32[2, 24], float32[24, 4], float32[4, 40], float32[2, 40]) = fit(f_1, w_1, b_1)
getitem: float32[2, 24] = getitem(fit, 0)
getitem_1: float32[24, 4] = getitem(fit, 1)
getitem_2: float32[4, 40] = getitem(fit, 2)
getitem_3: float32[2, 40] = getitem(fit, 3)
reshape_default: float32[2, 24] = aten.reshape.default(sin, [2, 24])
sub_tensor: float32[2, 24] = aten.sub.Tensor(reshape_default, getitem)
mm_default: float32[2, 4] = aten.mm.default(sub_tensor, getitem_1)
masked_fill_scalar: float32[2, 4] = aten.masked_fill.Scalar(mm_default, any_default, nan)
addmm_default: float32[2, 40] = aten.addmm.default(getitem_3, masked_fill_scalar, getitem_2)
unsqueeze_1: float32[2, 1, 40] = aten.unsqueeze.default(addmm_default, 1)
add: float32[2, 3, 40] = aten.add.Tensor(x_1, unsqueeze_1)
return add""",
    )
    assert factored.weight_bytes == 4 * (40 * 24 + 40)
    assert factored.factor_bytes == 4 * (2 * 24 + 24 * 4 + 4 * 40 + 2 * 40) == factored.report.bytes_added
    assert not factored.report.exact
    assert factor(graph_module).report.changed == 0


@pytest.mark.parametrize("t", [torch.tensor([0.25, 0.25]), torch.tensor([0.1, 0.9])], ids=["even", "by image"])
def test_layers_give_what_the_twin_gives(t: Tensor) -> None:
    graph_module = trace(labelled, X, T, Y, FREQUENCIES, W, B, V)
    factored = factor(graph_module)
    (curve,) = factored.curves
    assert [layer.node for layer in curve.layers] == ["addmm", "mm_1"]
    got = graph_module(X, t, Y, FREQUENCIES, W, B, V)

    def g(times: Tensor) -> np.ndarray:
        return F.silu(torch.sin(times[:, None].double() @ FREQUENCIES.double()) + Y.double()).numpy()

    mean, basis = twin.fit(np.stack([g(s.expand(2)) for s in SAMPLES]), 4)
    w, b, v, x = (tensor.double().numpy() for tensor in (W, B, V, X))
    scale, shift = twin.layer(g(t), w, b, mean, basis), twin.layer(g(t), v.T, 0 * b, mean, basis)
    expected = x * scale[:, None] + np.tanh(shift)[:, None]
    assert np.abs(got.double().numpy() - expected).max() < 1e-5 * np.abs(expected).max()  # fp32 against float64


def test_a_timestep_outside_the_range_gives_nan() -> None:
    graph_module = trace(of_time, X, T, FREQUENCIES, W, B)
    factor(graph_module)
    for t in (torch.tensor([0.5, 1.01]), torch.tensor([-0.01, 0.5])):
        assert graph_module(X, t, FREQUENCIES, W, B).isnan().all()
    assert graph_module(X, torch.tensor([0.0, 1.0]), FREQUENCIES, W, B).isfinite().all()


def test_layers_of_half_precision_read_coefficients_that_were_not_rounded_before_the_mean_was_taken() -> None:
    def half(x: Tensor, t: Tensor, f: Tensor, w: Tensor, b: Tensor) -> Tensor:
        g = torch.sin(t[:, None] @ f).bfloat16()
        return x + F.linear(g[:, None], w, b)

    graph_module = trace(half, X, T, FREQUENCIES, W.bfloat16(), B.bfloat16())
    factored = factor(graph_module)
    (curve,) = factored.curves
    assert curve.dtype is torch.float32 and curve.layers[0].dtype is torch.bfloat16
    inputs = (X, T, FREQUENCIES, W.bfloat16(), B.bfloat16())
    assert (graph_module(*inputs) - half(*inputs)).norm() < 0.02 * half(*inputs).norm()  # a few roundings of 2^-8


def test_the_layer_nearer_to_the_timestep_stays_exact() -> None:
    def two(x: Tensor, t: Tensor, f: Tensor, inner: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x + F.linear(torch.sin(t[:, None] @ f) @ inner, w, b)[:, None]

    factored = factor(trace(two, X, T, FREQUENCIES, torch.randn(24, 24), W, B))
    assert [layer.node for layer in factored.curves[0].layers] == ["addmm"]
    assert "mm_1: it computes mm_1, which 1 factored layers read; it stays exact." in reasons(factored)


def test_the_layer_behind_a_larger_one_is_computed_from_what_that_gives() -> None:
    def two(x: Tensor, t: Tensor, f: Tensor, outer: Tensor, w: Tensor) -> Tensor:
        return x + ((torch.sin(t[:, None] @ f) @ outer).tanh() @ w).mean()

    factored = factor(trace(two, X, T, FREQUENCIES, torch.randn(24, 200), torch.randn(200, 8)))
    assert [layer.node for layer in factored.curves[0].layers] == ["mm_1"]
    assert "its input comes from mm_1, which is factored; it is computed exactly." in reasons(factored)


def _with_weight(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def fn(x: Tensor, t: Tensor, y: Tensor, f: Tensor, w: Tensor) -> Tensor:
        return x.sum() + product(torch.sin(t[:, None] @ f) + y, t, w).sum()

    return fn


DECLINED: list[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor], Tensor]] = [
    ("rank 4 is not below the sizes of its weight, [4, 24]", lambda g, t, w: F.linear(g, w), torch.randn(4, 24)),
    ("has 6 rows for a batch of 2", lambda g, t, w: F.linear((g[:, None] + torch.ones(3, 1)).relu(), w), W),
    ("its weight is also read by", lambda g, t, w: F.linear(g, w) + w.sum(), W),
    ("shared by 1 layers, take what their factors save", lambda g, t, w: F.linear(g, w), torch.randn(6, 24)),
    ("is a formula of the timestep", lambda g, t, w: F.linear((t[:, None] * torch.arange(24)).sin(), w), W),
    ("its weight is not a constant", lambda g, t, w: F.linear(g, w * t.sum()), W),
]


@pytest.mark.parametrize(("why", "product", "weight"), DECLINED, ids=[row[0] for row in DECLINED])
def test_declined(why: str, product: Callable[[Tensor, Tensor, Tensor], Tensor], weight: Tensor) -> None:
    graph_module = trace(_with_weight(product), X, T, Y, FREQUENCIES, weight)
    before = format_graph(graph_module.graph)
    factored = factor(graph_module)
    assert factored.curves == () and why in reasons(factored)
    assert format_graph(graph_module.graph) == before


def test_so_many_rows_that_their_offsets_are_larger_than_the_weight_are_declined() -> None:
    graph_module = trace(of_time, X[:1].expand(30, 3, 40), torch.rand(30), FREQUENCIES, W, B)
    assert "an offset of 30 rows take no less than its weight of width 24" in reasons(factor(graph_module))


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=0"):
        factor(trace(of_time, X, T, FREQUENCIES, W, B), rank=0)
