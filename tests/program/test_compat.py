"""What Inductor is told from outside of its graph: an order that it keeps, and where products go."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from fusion_compile._program import _compat
from fusion_compile._program._compat import (
    inductor_orders,
    numbers_apart_from_sums,
    products_written_into_concatenations,
    small_kernels_together,
)


def two_products(x: Tensor) -> tuple[Tensor, Tensor]:
    return x @ x, torch.linalg.multi_dot([x.T, x])


def second_first(graph: fx.Graph) -> Mapping[fx.Node, fx.Node]:
    first, second = (node for node in graph.nodes if "aten.mm" in str(node.target))
    # The graph is in topological order: what waits must stand behind.
    second.append(first)
    return {first: second}


def products(code: list[str]) -> list[str]:
    lines = [line for line in "\n".join(code).splitlines() if "extern_kernels.mm(" in line]
    return ["transposed" if "reinterpret_tensor" in line else "plain" for line in lines]


def test_inductor_runs_a_node_after_the_one_that_it_waits_for() -> None:
    x = torch.randn(6, 6)
    _, code = run_and_get_code(torch.compile(two_products), x)
    assert products(code) == ["plain", "transposed"]
    torch.compiler.reset()
    with inductor_orders(second_first):
        assert config.post_grad_custom_post_pass is not None
        got, code = run_and_get_code(torch.compile(two_products), x)
    assert config.post_grad_custom_post_pass is None
    assert products(code) == ["transposed", "plain"]
    for one, other in zip(got, two_products(x), strict=True):
        torch.testing.assert_close(one, other)


def test_a_pass_of_the_users_runs_too() -> None:
    seen: list[int] = []
    with (
        config.patch(post_grad_custom_post_pass=lambda graph: seen.append(len(graph.nodes))),
        inductor_orders(lambda graph: {}),
    ):
        torch.compile(two_products)(torch.randn(5, 5))
    assert len(seen) == 1


def joined(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two products in one flat vector, a third that is transposed and a fourth that is read again."""
    again = y @ x
    flat = torch.cat([(x @ y).reshape(-1), (y @ y).reshape(-1), (x @ x).T.reshape(-1), again.reshape(-1)])
    return flat * 2, again.sin()


def written_in_place(code: list[str]) -> int:
    """Products whose result lies in another tensor."""
    text = "\n".join(code)
    products = re.findall(r"extern_kernels\.mm\([^\n]*out=(\w+)\)", text)
    return sum(bool(re.search(rf"^\s*{name} = reinterpret_tensor\(", text, re.M)) for name in products)


def test_a_product_is_written_into_the_concatenation_that_alone_reads_it() -> None:
    x, y = torch.randn(6, 6), torch.randn(6, 6)
    wanted = joined(x, y)
    for told, most in ((contextlib.nullcontext(), 0), (products_written_into_concatenations(), 2)):
        torch.compiler.reset()
        # Fixed layouts, as where products are autotuned.
        with told, config.patch(max_autotune=True, max_autotune_gemm_backends="ATEN", fx_graph_cache=False):
            got, code = run_and_get_code(torch.compile(joined), x, y)
        assert written_in_place(code) == most
        torch.testing.assert_close(got, wanted)


def scheduled(name: str, size: int, *, sums: int = 1, after: str = "", device: str = "cuda") -> Any:
    """A node as Inductor schedules it: `size` results, each the sum of `sums` entries, made from what `after` made."""
    return SimpleNamespace(
        group=(torch.device(device), (size, sums)),
        is_reduction=lambda: sums > 1,
        get_operation_names=lambda: {name},
        get_nodes=lambda: [scheduled(name, size, sums=sums, after=after, device=device)],
        ancestors={after},
    )


ROOT = scheduled("root", 1, after="sum")


@pytest.mark.parametrize(
    ("third", "apart"),
    [
        (scheduled("is finite", 1, after="sum"), True),
        (scheduled("count", 1, after="other"), False),
        (scheduled("scaled", 64, after="sum"), False),
        (scheduled("sum of it", 1, sums=64, after="sum"), False),
    ],
)
def test_of_what_follows_from_a_sum_one_number_is_computed_in_its_kernel(third: Any, apart: bool) -> None:
    total = scheduled("sum", 1, sums=256)
    assert _compat._goes_on_from_a_sum([total, ROOT, third]) is apart
    assert not _compat._goes_on_from_a_sum([total, third]), "one is no fault"
    assert not _compat._goes_on_from_a_sum([scheduled("sum", 8, sums=256), ROOT, third]), "no sum over everything"
    assert not _compat._goes_on_from_a_sum([total, ROOT, SimpleNamespace()]), "a library's kernel is never fused"
    on_cpu = [scheduled("sum", 1, sums=256, device="cpu"), *(scheduled(n, 1, after="sum", device="cpu") for n in "ab")]
    assert not _compat._goes_on_from_a_sum(on_cpu)


@pytest.mark.parametrize(("version", "told"), [("3.7.1", True), ("3.6.0", False), ("3.8.0", False), (None, False)])
def test_only_a_triton_that_fails_is_spared_such_kernels(
    version: str | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.scheduler import Scheduler

    def said(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    thresholds: list[int] = []

    def theirs(self: Any, one: Any, other: Any) -> bool:
        thresholds.append(config.score_fusion_memory_threshold)
        return True

    monkeypatch.setattr(Scheduler, "can_fuse", theirs)
    monkeypatch.setattr(importlib.metadata, "version", said)
    given, scheduler = config.score_fusion_memory_threshold, SimpleNamespace()
    total, both = scheduled("sum", 1, sums=256), SimpleNamespace(get_nodes=lambda: [ROOT, ROOT])
    with numbers_apart_from_sums():
        ask: Any = Scheduler.can_fuse
        assert ask(scheduler, total, both) is not told
        assert ask(scheduler, total, ROOT) and ask(scheduler, ROOT, ROOT)
    assert Scheduler.can_fuse is theirs
    assert thresholds == ([given, 1] if told else [given] * 3)


def graph_of_inputs(device: str) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, device=device)
    graph.output(x)
    return fx.GraphModule({}, graph)


def test_kernels_are_launched_together_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.scheduler import ForeachKernelSchedulerNode

    def groups() -> Any:
        ask: Any = ForeachKernelSchedulerNode.group_nodes_for_combo_kernels
        return config.combo_kernels, ask(SimpleNamespace(nodes=[], _topological_sort_nodes=lambda: []))

    monkeypatch.setattr(_compat, "_small_groups", lambda scheduler: ["ours"])
    for graph, patched in ((graph_of_inputs("cpu"), False), (graph_of_inputs("meta"), False)):
        with small_kernels_together(graph):
            assert groups() == (patched, [])
    monkeypatch.setattr(_compat, "_on_gpu", lambda graph: True)
    with small_kernels_together(graph):
        assert groups() == (True, ["ours"]) and config.combo_kernel_peak_memory_pct_threshold == 0.0
    assert groups() == (False, [])
    with config.patch(combo_kernels=True), small_kernels_together(graph):
        assert groups() == (True, []), "the user's own choice stays"


def test_a_compiler_for_gpus_that_is_missing_or_known_to_fail_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.scheduler import Scheduler

    def found(name: str) -> object | None:
        return object()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in _compat.why_no_kernels() and "pip install" in _compat.why_no_kernels()
    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.7.1")
    assert _compat.why_no_kernels() == "", "such kernels are kept from being written"
    monkeypatch.delattr(Scheduler, "can_fuse")
    said = _compat.why_no_kernels()
    assert said.startswith("Triton 3.7.1 cannot compile some kernels") and "install Triton 3.6, or 3.8" in said
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.8.0")
    assert _compat.why_no_kernels() == ""


def test_tritons_that_come_with_torch_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "pytorch-triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.7.0+git1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert _compat._triton() == "3.7.0+git1" and _compat._this_triton_fails()
