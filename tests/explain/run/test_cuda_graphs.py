"""CUDA graphs, read from torch's own messages."""

from __future__ import annotations

import logging

import torch
import torch._dynamo
from torch import Tensor, fx

from fusion_compile._program.cuda_graph import Replay
from fusion_compile.explain._facts import CudaGraphSkip
from fusion_compile.explain._run.cuda_graphs import cuda_graph_findings, read_cuda_graphs
from fusion_compile.explain._run.runtime import happened
from tests.explain.observed import observed
from tests.explain.run.lines import line_of


def fake_cuda_program() -> fx.Graph:
    """``state.add_(x)`` and a table on the CPU, traced with tensors of a GPU that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(state: Tensor, x: Tensor) -> Tensor:
        table = torch.arange(4).float()  # the table
        state.add_(x)  # the write
        return table

    with FakeTensorMode():
        graph = make_fx(step)(torch.empty(4, device="cuda"), torch.empty(4, device="cuda")).graph
    for name, text in (("_to_copy", "the table"), ("add_", "the write")):
        (node,) = (n for n in graph.nodes if n.name == name)
        node.meta["stack_trace"] = (
            f'  File "{__file__}", line {line_of(__file__, text).rpartition(":")[2]}, in step\n    …'
        )
    return graph


def test_a_skip_is_told_with_its_reason_remedy_and_line() -> None:
    from torch._inductor import config, cudagraph_utils

    graph = fake_cuda_program()
    table = next(n for n in graph.nodes if n.name == "arange")
    with config.patch(graph_partition=False):
        on_cpu = cudagraph_utils.check_multiple_devices_or_any_cpu_nodes({torch.device("cpu"): table})
    mutated = cudagraph_utils.get_mutation_stack_trace(cudagraph_utils.get_placeholder_info(graph), [0])
    assert on_cpu is not None

    def skips() -> None:
        cudagraph_utils.log_cudagraph_skip_and_bump_counter(on_cpu)
        cudagraph_utils.log_cudagraph_skip_and_bump_counter(mutated)

    seen = observed(skips, backend=None)
    reasons = [skip.reason for skip in seen.facts.cudagraphs.skips]
    assert reasons == ["cpu device (arange)", "mutated inputs (1 instances)"]
    assert [(f.kind, f.where) for f in seen.findings] == [
        ("cudagraph_skip", line_of(__file__, "the table")),
        ("cudagraph_skip", line_of(__file__, "the write")),
    ]
    assert "mark_static_address" in seen.findings[1].remedy
    assert happened(seen.facts) == {"cudagraph_skip"}


def test_partitions_recordings_and_their_repetition() -> None:
    scheduler = logging.getLogger("torch._inductor.scheduler.__cudagraphs")
    trees = logging.getLogger("torch._inductor.cudagraph_trees.__cudagraphs")

    def runs() -> None:
        scheduler.debug("Created %d graph partitions: %d cudagraphable, %d non-cudagraphable", 3, 2, 1)
        scheduler.debug("  Partition %d: %d nodes, %s, inputs=%d, outputs=%d", 1, 1, "non-cudagraphable", 1, 1)
        scheduler.debug("    %s: %s", "op4", "reason=cpu ops, ir=ComputedBuffer, fx=aten.sin.default(arg0_1)")
        scheduler.debug("         %s", 'File "/home/u/model.py", line 9, in forward')
        scheduler.debug("         %s", "  y = x.cpu().sin()")
        for _ in range(2):
            trees.debug("[%s] Recording function=%s, mode=%s, cuda_graph_id=%d", "0/0", "0", "FORWARD", 1)
        moved = "static inputs: input name: primals_1. data pointer changed from 1 to 2."
        stack = 'input stack trace: File "/home/u/model.py", line 5, in forward\n    w = self.weight\n'
        trees.debug("[%s] Re-recording function=%s, mode=%s, reason=%s", "0/0", "0", "FORWARD", f"{moved} {stack}")

    seen = observed(runs, backend=None)
    graphs = seen.facts.cudagraphs
    assert (graphs.captures, graphs.partitions, len(graphs.rerecords)) == (2, 2, 1)
    assert [(f.kind, f.op) for f in seen.findings] == [
        ("cudagraph_partition", "aten.sin.default"),
        ("rerecord", "CUDA graph"),
    ]
    assert "cpu ops" in seen.findings[0].why and seen.findings[0].where == "/home/u/model.py:9"
    assert "copy_" in seen.findings[1].remedy and seen.findings[1].where == "/home/u/model.py:5"
    assert happened(seen.facts) == {"cudagraph_partition", "rerecord"}


def test_a_samplers_own_recordings_are_heard() -> None:
    weights = [torch.ones(2)]
    loop = Replay(lambda x: (x * weights[0],), lambda: weights, lambda fn, given: (lambda: None, fn(*given)))

    def runs() -> None:
        loop(torch.ones(2))
        weights[0] = torch.ones(2)
        loop(torch.ones(2))

    seen = observed(runs, backend=None)
    assert (seen.facts.cudagraphs.captures, len(seen.facts.cudagraphs.rerecords)) == (1, 1)
    assert [f.kind for f in seen.findings] == ["rerecord"] and "moved" in seen.findings[0].why


def test_a_skip_that_no_line_explains_is_counted_all_the_same() -> None:
    facts = read_cuda_graphs([], 1)
    assert facts.skips == (CudaGraphSkip("torch gives no reason", ""),)
    assert [f.kind for f in cuda_graph_findings([], facts)] == ["cudagraph_skip"]
