"""find_host_syncs: every operator that waits for the device or escapes a CUDA graph is found, at the user's line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import find_host_syncs

SQUARE = torch.eye(4) + 0.1


def exported(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    return make_fx(fn, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)


ATEN: list[tuple[str, str, Callable[[Tensor], Any]]] = [
    ("host_sync", "nonzero", lambda x: torch.nonzero(x)),
    ("host_sync", "index", lambda x: x[x > 0]),
    ("host_sync", "masked_select", lambda x: x.masked_select(x > 0)),
    ("host_sync", "_local_scalar_dense", lambda x: x.sum() * x[0, 0].item()),
    ("host_sync", "_linalg_check_errors", lambda x: torch.linalg.cholesky(x @ x.mT)),
    ("capture_unsafe", "_linalg_eigh", lambda x: torch.linalg.eigh(x)[0]),
    ("capture_unsafe", "_linalg_svd", lambda x: torch.linalg.svd(x)[1]),
    ("capture_unsafe", "linalg_inv_ex", lambda x: torch.linalg.inv(x)),
]


@pytest.mark.parametrize(("kind", "op", "fn"), ATEN, ids=[row[1] for row in ATEN])
def test_found_in_an_aten_graph(kind: str, op: str, fn: Callable[[Tensor], Any]) -> None:
    findings = find_host_syncs(exported(fn, SQUARE))
    assert (kind, op) in [(f.kind, f.op.split(".")[1]) for f in findings]
    assert all(f.why.endswith(".") and f.remedy.endswith(".") for f in findings)


def test_absent_in_a_clean_graph() -> None:
    def clean(x: Tensor) -> Tensor:
        x = torch.where(x > 0, x, 0.0).to(torch.bfloat16).float()
        x[x < 0] = 0.0  # a mask that is assigned one number is masked_fill
        return torch.linalg.qr(x)[0] + x[torch.tensor([0, 1, 2, 3])]

    assert find_host_syncs(exported(clean, SQUARE)) == ()


def captured(fn: Callable[[Tensor], Any]) -> fx.GraphModule:
    """What Dynamo hands to a backend, before ATen."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        torch.compile(fn, backend=keep, fullgraph=True)(SQUARE)
    return graphs[0]


@pytest.mark.parametrize(
    ("op", "fn"),
    [
        ("tensor.item()", lambda x: x * x.sum().item()),
        ("tensor.cpu()", lambda x: x.cpu() + 1),
        ("linalg_eigh", lambda x: torch.linalg.eigh(x)[0]),
        ("nonzero", lambda x: torch.nonzero(x)),
        ("cond", lambda x: torch.cond(x.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (x,))),
    ],
)
def test_found_in_a_dynamo_graph_at_the_users_line(op: str, fn: Callable[[Tensor], Any]) -> None:
    findings = find_host_syncs(captured(fn))
    assert op in [f.op for f in findings]
    assert all(f.where.startswith(__file__) for f in findings)


def test_copies_to_the_cpu_count_only_when_they_leave_a_device() -> None:
    with torch._subclasses.FakeTensorMode():
        there, here = torch.empty(3, device="cuda"), torch.empty(3)
        leaves = make_fx(lambda x: torch.ops.aten._to_copy.default(x, device=torch.device("cpu")))(there)
        stays = make_fx(lambda x: torch.ops.aten._to_copy.default(x, device=torch.device("cpu")))(here)
    assert [f.kind for f in find_host_syncs(leaves)] == ["host_sync"]
    assert find_host_syncs(stays) == ()


def test_every_node_is_one_finding() -> None:
    findings = find_host_syncs(exported(lambda x: x[x > 0].sum() + x[x > 1].sum(), SQUARE))
    assert len([f for f in findings if "index" in f.op]) == 2


def test_histc_waits_only_where_it_has_to_find_the_range() -> None:
    """Mixtures of experts count their tokens so."""
    bounded = make_fx(lambda x: torch.histc(x, bins=4, min=0, max=3), tracing_mode="fake")(torch.ones(5))
    assert find_host_syncs(bounded) == ()
    (found,) = find_host_syncs(make_fx(lambda x: torch.histc(x, bins=4), tracing_mode="fake")(torch.ones(5)))
    assert found.op == "aten.histc.default"
    assert found.why == "Without bounds it reads the smallest and the largest value on the host."
