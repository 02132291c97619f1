"""What explain hears while a program compiles and runs, and that nothing of torch's is otherwise than before."""

from __future__ import annotations

import functools
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, fx, nn

from fusion_compile._program.cuda_graph import Replay
from fusion_compile.explain import _compat
from fusion_compile.explain._facts import CudaGraphSkip
from fusion_compile.explain._run.cuda_graphs import cuda_graph_findings, read_cuda_graphs
from fusion_compile.explain._run.graph_breaks import break_findings, graph_break, read_break
from fusion_compile.explain._run.kernels import read_kernels, read_refusals
from fusion_compile.explain._run.listen import FusionLine, TraceRecord, listening
from fusion_compile.explain._run.phases import read_cache_use, read_phases
from fusion_compile.explain._run.recompile_reasons import plain_words
from fusion_compile.explain._run.recompiles import read_compilations, read_failures, read_guards
from fusion_compile.explain._run.runtime import happened, observe

HERE = str(Path(__file__))


def line_of(text: str) -> str:
    """``file:line`` of the first line of this file that ends with the comment `text`."""
    lines = Path(__file__).read_text().splitlines()
    return f"{HERE}:{next(i for i, line in enumerate(lines, 1) if line.endswith(f'# {text}'))}"


def torchs_state(before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything of torch's that observe touches; of the loggers those that are in `before`."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    names = before["loggers"] if before else [n for n in logging.root.manager.loggerDict if n.startswith("torch")]
    loggers = [logging.getLogger(name) for name in ("torch.__trace", *names)]
    return {
        "loggers": {x.name: (x.level, x.disabled, x.propagate, list(x.handlers), list(x.filters)) for x in loggers},
        "dynamo": torch._dynamo.config.get_config_copy(),
        "inductor": inductor_config.get_config_copy(),
        "functorch": functorch_config.get_config_copy(),
        "warnings": list(warnings.filters),
    }


def broken_by_the_clock(x: Tensor) -> Tensor:
    return x * 2 + time.time()  # the clock


def fails(x: Tensor) -> Tensor:
    return torch.cat([x, x[None]])


class CalledAsItIs:
    """What explains itself is not compiled: this runs `work` while torch is listened to."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def explain(self) -> None: ...

    def __call__(self) -> None:
        self.work()


# ---------------------------------------------------------------------- listening


def test_everything_of_torchs_is_as_before_also_after_an_error() -> None:
    _compat.import_inductor()
    torch.compile(torch.sin, backend="eager")(torch.randn(2))  # the first takes a handler of torch's away
    before = torchs_state()
    observe(broken_by_the_clock, (torch.randn(2),), backend="eager")
    assert torchs_state(before) == before
    with pytest.raises(Exception, match="dimensions of tensors must match"):
        observe(fails, (torch.randn(2),), backend="eager")
    assert torchs_state(before) == before


def test_others_who_listen_hear_what_they_would_hear_anyway() -> None:
    heard: list[logging.LogRecord] = []

    class Other(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    with listening():
        pass
    logger = logging.getLogger("torch._inductor.cudagraph_utils.__cudagraphs")
    logger.addHandler(other := Other())
    try:
        with listening() as ours:
            logger.debug("of no interest")
            logger.warning("skipping cudagraphs due to the test")
    finally:
        logger.removeHandler(other)
    assert [record.getMessage() for record in heard] == ["skipping cudagraphs due to the test"]
    assert ours.cuda_graphs == ["of no interest", "skipping cudagraphs due to the test"]


def test_what_was_compiled_before_is_seen_again_and_others_stay_compiled() -> None:
    def one(x: Tensor) -> Tensor:
        return x * 2 + time.time()

    def other(x: Tensor) -> Tensor:
        return x.sin()

    x = torch.randn(4)
    compiled, bystander = torch.compile(one, backend="eager"), torch.compile(other, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's, of time.time
        compiled(x)
    bystander(x)
    for seen in (observe(compiled, (x,)), observe(compiled, (x,)), observe(one, (x,), backend="eager")):
        assert [f.kind for f in seen.findings] == ["side_effect"]
    with torch.compiler.set_stance("fail_on_recompile"):
        bystander(x)


def test_a_shape_that_changed_before_counts_as_new() -> None:
    """Dynamo remembers which sizes of a function varied, also when its code is compiled anew."""

    def total(x: Tensor) -> Tensor:
        return x.sum(0)

    for _ in range(2):
        seen = observe(total, (torch.randn(4, 3),), calls=[(torch.randn(5, 3),)], backend="eager")
        assert [f.kind for f in seen.findings] == ["dynamic_shape"]


def test_a_program_without_tensors_says_that_nothing_was_compiled() -> None:
    seen = observe(CalledAsItIs(lambda: None))
    assert seen.findings == () and "nothing was compiled" in seen.notes[0]


# ---------------------------------------------------------------------- graph breaks


def test_a_break_has_the_users_stack_and_the_reason() -> None:
    def inner(x: Tensor) -> Tensor:
        return x / x.sum().item()  # the break

    def outer(x: Tensor) -> Tensor:
        return inner(x.relu()) + 1  # the call

    seen = observe(outer, (torch.rand(4),), backend="eager")
    (fact,) = seen.facts.graph_breaks
    assert [frame.split(": ")[0] for frame in fact.stack] == [line_of("the call"), line_of("the break")]
    assert fact.where == line_of("the break") == seen.findings[0].where
    assert "host" in fact.reason and "item" in fact.reason
    assert seen.findings[0].op == "tensor.item()"
    assert happened(seen.facts) == {"graph_break"}


def test_one_graph_that_was_asked_for_and_refused_is_a_finding() -> None:
    whole = torch.compile(broken_by_the_clock, backend="eager", fullgraph=True)
    (finding,) = observe(whole, (torch.randn(2),)).findings
    assert (finding.kind, finding.where) == ("side_effect", line_of("the clock"))


def test_a_reason_that_no_row_knows_is_told_in_torchs_words() -> None:
    text = (
        "Graph break in user code at /home/u/model.py:7\n"
        "Graph Break Reason: Something new in torch\n"
        "  Explanation: Dynamo cannot do this yet.\n"
        "  Hint: Please report an issue to PyTorch.\n"
        "  Hint: Use that instead.\n"
        "\n  Developer debug context: call_function New()\n"
        "\n For more details about this graph break, please visit: https://example.org/gb9999.html\n"
        '\nUser code traceback:\n  File "/home/u/train.py", line 3, in <module>\n    model(x)\n'
        '  File "/home/u/model.py", line 7, in forward\n    return new(x)\n           ^^^^^^\n\nNoneType: None\n'
    )
    found = read_break(text)
    (finding,) = break_findings([found])
    assert graph_break(found).stack == ("/home/u/train.py:3: model(x)", "/home/u/model.py:7: return new(x)")
    assert (finding.kind, finding.where) == ("graph_break", "/home/u/model.py:7")
    assert finding.why.startswith("Dynamo cannot do this yet.") and finding.remedy == "Use that instead."


# ---------------------------------------------------------------------- guards and recompiles


@pytest.mark.parametrize(
    ("guard", "kind", "op"),
    [
        ("lr == 0.1", "python_scalar", "lr"),
        ("self.scale == -1e-05", "python_scalar", "self.scale"),
        ("___stack0 == 1795522717.038696", "recompile", ""),
        ("mode == 'train'", "recompile", "mode"),
        ("self.training == True", "recompile", "self.training"),
        ("mask is None", "recompile", "mask"),
        ("tensor 'x' size mismatch at index 1. expected 4, actual 5", "dynamic_shape", "x"),
        ("tensor 'batch['x']' size mismatch at index 0. expected 4, actual 5", "dynamic_shape", "batch['x']"),
        ("2 <= x.size()[0]", "dynamic_shape", "x"),
        ("tensor 'x' dtype mismatch. expected Float, actual Double", "recompile", "x"),
        ("tensor 'x' requires_grad mismatch. expected requires_grad=0", "recompile", "x"),
        ("not history", "growing_state", "history"),
        ("len(self.history) == 3", "growing_state", "self.history"),
        ("len(d) != 1", "recompile", "d"),
        ("list(dict.keys(d))[0] == 'a'", "recompile", "d"),
        ("GLOBAL_STATE changed: grad_mode ", "recompile", "grad_mode"),
        ("___check_obj_id(self.w, 140376), type=<class 'torch.nn.parameter.Parameter'>", "rebound_parameter", "self.w"),
        ("___check_obj_id(fn, 140376), type=<class 'function'>", "recompile", "fn"),
        ("___check_type_id(x, 9421)", "recompile", "x"),
        ("Cache line invalidated because ___stack0 got deallocated", "recompile", ""),
        ("something() that nobody foresaw", "recompile", ""),
    ],
)
def test_a_guard_in_plain_words(guard: str, kind: str, op: str) -> None:
    words = plain_words(guard, {"d": "dict", "history": "list", "self.w": "torch.nn.parameter.Parameter"})
    assert (words.kind, words.op) == (kind, op)
    assert words.why.endswith("compiled again.") and words.remedy.endswith(".")
    assert "___" not in words.why or "Python number" in words.why


def test_guards_have_the_users_names_and_lines() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.scale  # the use

    module = Scaled()
    seen = observe(module, (torch.randn(4),), backend="eager")
    guards = {guard.text: guard.where for guard in seen.facts.guards}
    assert any("torch.float32" in text and "size=[4]" in text for text in guards)
    assert any(text.endswith(".scale == 2.0") for text in guards)
    assert set(guards.values()) == {line_of("the use")}


def test_the_first_guard_that_failed_is_told_with_its_line() -> None:
    def scaled(x: Tensor, factor: float) -> Tensor:
        return x * factor  # the factor

    x = torch.randn(4)
    seen = observe(scaled, (x, 1.0), calls=[(x, 2.0), (x, 3.0)], backend="eager")
    (again,) = seen.facts.recompiles  # the second time torch takes any number
    assert (again.function, again.guard, again.where) == ("scaled", "factor == 1.0", line_of("the factor"))
    assert again.compile_id.endswith("/1")
    assert happened(seen.facts) == {"recompile"}


def test_what_is_compiled_too_often_is_said_to_run_uncompiled() -> None:
    seen_before: list[Tensor] = []

    def remembers(x: Tensor) -> Tensor:  # the definition
        seen_before.append(x)
        return torch.stack(seen_before).sum()

    x = torch.randn(2)
    with torch._dynamo.config.patch(recompile_limit=2):
        cause, consequence = observe(remembers, (x,), calls=[(x,)] * 3, backend="eager").findings
    assert (cause.kind, cause.op) == ("growing_state", "seen_before")
    assert (consequence.kind, consequence.where) == ("recompile", line_of("the definition"))
    assert "2 times" in consequence.why and "uncompiled" in consequence.why


def test_modules_are_observed_with_their_hooks_and_so_are_torchs_own_and_methods() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    def reads(module: nn.Module, args: Any, output: Tensor) -> None:
        output.sum().item()  # the hook

    class Called:
        def __call__(self, x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(4, 4)
    hooked = Doubles()
    hooked.register_forward_hook(reads)
    (finding,) = observe(hooked, (x,), backend="eager").findings
    assert (finding.kind, finding.where) == ("host_sync", line_of("the hook"))
    stacked = nn.Sequential(nn.Linear(4, 4), Doubles())
    for clean in (Doubles(), Doubles().forward, nn.Linear(4, 4), stacked, Called(), functools.partial(Called())):
        seen = observe(clean, (x,), backend="eager")
        assert seen.findings == () and seen.notes == () and seen.facts.phases


def test_a_guard_tree_of_torch_211_is_read() -> None:
    text = (
        "| +- GuardManager: source=L['d'], accessed_by=FrameLocalsGuardAccessor(key='d', framelocals_idx=0), "
        "type=<class 'dict'>, tag_safe=(False, False)\n"
        "| | +- EQUALS_MATCH: L['d']['n'] == 3                     # x * d['n']  # src/model.py:4 in forward\n"
        "| | +- GLOBAL_STATE: ___check_global_state() against {}   # x * d['n']  # src/model.py:4 in forward\n"
    )
    guards, types = read_guards(text, {"/home/u/src/model.py"})
    assert [(g.text, g.where) for g in guards] == [("d['n'] == 3", "/home/u/src/model.py:4")]
    assert types == {"d": "dict"}


def test_a_recompile_is_read_with_and_without_a_stack_and_not_if_it_is_of_another_program() -> None:
    metrics = {"co_name": "forward", "co_filename": "/home/u/src/model.py", "co_firstlineno": 3}
    compilations = read_compilations([TraceRecord("compilation_metrics", "0/0", metrics, "")])
    commented = "0/0: L['lr'] == 0.1                    # x * lr  # src/model.py:4 in forward"
    with_stack = '0/0: lr == 0.1\nUser stack trace:\n  File "/home/u/src/model.py", line 5, in forward\n    x * lr'
    without = "0/0: tensor 'L['x']' size mismatch at index 0. expected 4, actual 5"
    other = "7/0: lr == 0.1"
    payloads = [json.dumps([commented, other]), with_stack, without, other]
    records = [TraceRecord("recompile_reasons", f"0/{i}", {}, text) for i, text in enumerate(payloads, 1)]
    found = read_failures(records, compilations, of_these_only=True)
    assert [(f.text, f.where, f.compile_id) for f in found] == [
        ("lr == 0.1", "/home/u/src/model.py:4", "0/1"),
        ("lr == 0.1", "/home/u/src/model.py:5", "0/2"),
        ("tensor 'x' size mismatch at index 0. expected 4, actual 5", "/home/u/src/model.py:3", "0/3"),
    ]
    assert len(read_failures(records, compilations, of_these_only=False)) == 4


# ---------------------------------------------------------------------- Inductor


def test_kernels_refusals_phases_and_caches_of_a_compiled_program() -> None:
    def program(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ w).relu()  # the product
        return y.softmax(-1) * 2, x.sum(0)  # the softmax

    inputs = torch.randn(8, 16), torch.randn(16, 16)
    seen = observe(program, inputs)
    facts = seen.facts
    library, generated = facts.kernels
    assert library.nodes == ("mm",) and library.where == (line_of("the product"),)
    assert {"relu", "exp", "div"} <= set(generated.nodes)
    assert set(generated.where) == {line_of("the product"), line_of("the softmax")}
    assert generated.source.startswith(f"{generated.name} = ") and "kernel(" in generated.source
    assert facts.fusion_refusals and all(r.reason for r in facts.fusion_refusals)
    assert {name for r in facts.fusion_refusals for name in r.first.split(", ")} <= {
        "exp",
        "sub",
        "relu",
        "sum_1",
        "amax",
    }
    assert [phase.name.split(":")[0] for phase in facts.phases] == ["Dynamo", "AOTAutograd", "Inductor", "Code"]
    assert all(phase.seconds > 0 for phase in facts.phases)
    assert facts.cache.hits == 0  # the caches were left aside
    assert seen.findings == () and seen.notes == ()

    torch.compiler.reset()
    observe(program, inputs, fresh=False)
    torch.compiler.reset()
    warm = observe(program, inputs, fresh=False).facts
    assert warm.cache.hits > 0
    assert [k.name for k in warm.kernels] == [k.name for k in facts.kernels]


def test_kernels_without_provenance_take_the_nodes_from_the_codes_comments() -> None:
    code = (
        "# Topologically Sorted Source Nodes: [mul, sin], Original ATen: [aten.mul, aten.sin]\n"
        "triton_poi_fused_mul_sin_0 = async_compile.triton('triton_poi_fused_mul_sin_0', '''\n"
        "def triton_poi_fused_mul_sin_0(in_ptr0): ...\n"
        "''', device_str='cuda')\n"
    )
    (kernel,) = read_kernels([TraceRecord("inductor_output_code", "0/0", {}, code)])
    assert kernel.name == "triton_poi_fused_mul_sin_0" and kernel.nodes == ("mul", "sin")
    assert "in_ptr0" in kernel.source


def test_a_refusal_is_named_by_the_graphs_nodes_and_told_once() -> None:
    text = "cannot fuse op3 with op7_op8: numel/rnumel mismatch (reduce) (128, 1),\n (64, 2)"
    line = FusionLine(text, ("relu",), ())
    (refusal,) = read_refusals([line, line])
    assert (refusal.first, refusal.second) == ("relu", "op7_op8")
    assert refusal.reason == "numel/rnumel mismatch (reduce) (128, 1), (64, 2)"


def test_phases_are_told_without_the_phases_inside_them() -> None:
    metrics = {"entire_frame_compile_time_s": 10.0, "backend_compile_time_s": 7.0, "inductor_compile_time_s": 5.0}
    phases = read_phases([TraceRecord("compilation_metrics", "0/0", {**metrics, "code_gen_time_s": None}, "")] * 2)
    assert [phase.seconds for phase in phases] == [6.0, 4.0, 10.0]


def test_caches_count_whatever_their_records_hold() -> None:
    kinds = [
        "fx_graph_cache_hit",
        "fx_graph_cache_miss",
        "aotautograd_cache_miss",
        "fx_graph_cache_bypass",
        "other_hit",
    ]
    use = read_cache_use([TraceRecord(kind, "0/0", {}, "") for kind in kinds])
    assert (use.hits, use.misses, use.bypasses) == (1, 2, 1)


# ---------------------------------------------------------------------- CUDA graphs, in torch's own words


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
        node.meta["stack_trace"] = f'  File "{HERE}", line {line_of(text).rpartition(":")[2]}, in step\n    …'
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

    seen = observe(CalledAsItIs(skips))
    reasons = [skip.reason for skip in seen.facts.cudagraphs.skips]
    assert reasons == ["cpu device (arange)", "mutated inputs (1 instances)"]
    assert [(f.kind, f.where) for f in seen.findings] == [
        ("cudagraph_skip", line_of("the table")),
        ("cudagraph_skip", line_of("the write")),
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

    seen = observe(CalledAsItIs(runs))
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

    seen = observe(CalledAsItIs(runs))
    assert (seen.facts.cudagraphs.captures, len(seen.facts.cudagraphs.rerecords)) == (1, 1)
    assert [f.kind for f in seen.findings] == ["rerecord"] and "moved" in seen.findings[0].why


def test_a_skip_that_no_line_explains_is_counted_all_the_same() -> None:
    facts = read_cuda_graphs([], 1)
    assert facts.skips == (CudaGraphSkip("torch gives no reason", ""),)
    assert [f.kind for f in cuda_graph_findings([], facts)] == ["cudagraph_skip"]
