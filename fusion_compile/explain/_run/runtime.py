"""Compile a program, run it, and report what happened."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fusion_compile.explain import _compat
from fusion_compile.explain._arguments import Call, Invocation
from fusion_compile.explain._facts import RuntimeFacts
from fusion_compile.explain._findings import deduplicate
from fusion_compile.explain._run.compilations import read_compilations
from fusion_compile.explain._run.cuda_graphs import cuda_graph_findings, read_cuda_graphs
from fusion_compile.explain._run.graph_breaks import Break, break_findings, graph_break, read_break, read_breaks
from fusion_compile.explain._run.kernels import read_kernels, read_refusals
from fusion_compile.explain._run.listen import Heard, listening
from fusion_compile.explain._run.phases import read_cache_use, read_phases
from fusion_compile.explain._run.recompiles import limit_findings, read_failures, recompile, recompile_findings
from fusion_compile.explain._run.use_sites import Callee, callee_of
from fusion_compile.passes import Finding

_DYNAMOS_OWN = (
    "Dynamo does not know how to trace",  # the findings say so
    "The .grad attribute of a Tensor that is not a leaf",  # Dynamo reads it where it resumes after a break
)
"""Warnings that the program does not cause. Where warnings are errors they would stop its compilation."""


class Observation(NamedTuple):
    """The events of a run, the findings among them, and notes for their reader."""

    facts: RuntimeFacts
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def observe(
    fn: Callable[..., Any], calls: Sequence[Call], *, backend: str | None = "inductor", fresh: bool = True
) -> Observation:
    """Run `fn` on each of `calls` in order and listen to torch. A function among them is called in between.

    `backend`: compile `fn` with it for this purpose; breaks of its graph are allowed. What torch.compile returned keeps
    its own backend. None calls `fn` as it is.
    `fresh`: also compile what is already compiled in this process or cached on disk; otherwise torch logs nothing.
    Other compiled functions stay compiled.

    Afterwards all of torch's settings and loggers are as before. If `fn` asks for one graph and Dynamo cannot make it,
    that is a finding. All other exceptions of `fn` pass through.
    """
    with warnings.catch_warnings(), contextlib.ExitStack() as inside:
        for message in _DYNAMOS_OWN:
            warnings.filterwarnings("ignore", message=message)
        inside.enter_context(_compat.inductor_tells())
        if fresh:
            inside.enter_context(_compat.caches_aside())
        run = fn if backend is None else _compiled(fn, backend, fresh)
        heard = inside.enter_context(listening())
        try:
            refused = _run(run, calls)
        finally:
            if run is not fn and fresh:
                _compat.forget_compiled(run)  # torch would keep it, and the tensors that it saw, with the code
    callee = callee_of(_compat.uncompiled(fn)) if backend is not None else None
    return _observation(heard, refused, callee, compiled_before=run is fn or not fresh, fresh=fresh)


def _compiled(fn: Callable[..., Any], backend: str, fresh: bool) -> Callable[..., Any]:
    if _compat.is_compiled(fn):
        if fresh:
            _compat.forget_compiled(fn)
        return fn
    if isinstance(fn, nn.Module):
        if fresh and _compat.may_be_called_bare(fn):
            return torch.compile(_compat.own_code(fn.forward), backend=backend)
        compiled: Callable[..., Any] = torch.compile(fn, backend=backend)
        if fresh:
            _compat.forget_compiled(compiled)
        return compiled
    method = getattr(fn, "__call__", None)  # noqa: B004
    if isinstance(method, types.MethodType):
        fn = method  # of an object: Dynamo traces the frame of its class's method
    return torch.compile(_compat.own_code(fn) if fresh else fn, backend=backend)


def _run(run: Callable[..., Any], calls: Sequence[Call]) -> BaseException | None:
    """Make the calls. Return Dynamo's refusal to make one graph, if there is one."""
    for call in calls:
        if not isinstance(call, Invocation):
            call()
            continue
        try:
            run(*call.args, **call.kwargs)
        except Exception as error:
            refused = _compat.unsupported_inside(error)
            if refused is None:
                raise
            return refused
    return None


def _observation(
    heard: Heard, refused: BaseException | None, callee: Callee | None, *, compiled_before: bool, fresh: bool
) -> Observation:
    breaks = read_breaks(heard.trace)
    if refused is not None and not breaks:
        breaks = (_from_exception(refused),)
    compilations = read_compilations(heard.trace)
    failures = read_failures(heard.trace, compilations, of_these_only=fresh, callee=callee)
    cuda_graphs = read_cuda_graphs(heard.cuda_graphs, heard.cuda_graph_skips)
    facts = RuntimeFacts(
        graph_breaks=tuple(graph_break(b) for b in breaks),
        recompiles=tuple(recompile(f, compilations) for f in failures),
        guards=tuple(dict.fromkeys(g for c in compilations.values() for g in c.guards)),
        kernels=read_kernels(heard.trace),
        fusion_refusals=read_refusals(heard.fusion),
        cudagraphs=cuda_graphs,
        phases=read_phases(heard.trace),
        cache=read_cache_use(heard.trace),
    )
    causes = [f for f in failures if not (breaks and f.follows_from_a_break)]
    findings = break_findings(breaks) + recompile_findings(causes)
    findings += limit_findings(heard.trace, compilations)
    findings += cuda_graph_findings(heard.cuda_graphs, cuda_graphs)
    return Observation(facts, deduplicate(findings), _notes(heard, compiled_before))


def _from_exception(error: BaseException) -> Break:
    stack = "".join(
        f'  File "{f.filename}", line {f.lineno}, in {f.name}\n    {f.line}\n' for f in _compat.user_frames(error)
    )
    return read_break(f"{error}\nUser code traceback:\n{stack}")


def _notes(heard: Heard, compiled_before: bool) -> tuple[str, ...]:
    if heard.not_understood:
        said = f"{len(heard.not_understood)} of torch's messages could not be read ({heard.not_understood[0]})."
        return (said,)
    if heard.of("compilation_metrics"):
        return ()
    if heard.of("chromium_event"):
        return ("it was compiled as it was captured by running, so there are no graph breaks and no guards.",)
    why = "it was compiled before" if compiled_before else "Dynamo met no tensor operation that it can trace"
    return (f"nothing was compiled while the program ran ({why}), so breaks, guards and kernels are not known.",)


def happened(facts: RuntimeFacts) -> frozenset[str]:
    """Return which of graph_break, recompile, cudagraph_skip, cudagraph_partition and rerecord occurred.

    A finding is named after its cause, so these kinds may occur without a finding of their name.
    """
    seen = {
        "graph_break": facts.graph_breaks,
        "recompile": facts.recompiles,
        "cudagraph_skip": facts.cudagraphs.skips,
        "cudagraph_partition": facts.cudagraphs.partitions > 1,
        "rerecord": facts.cudagraphs.rerecords,
    }
    return frozenset(kind for kind, occurred in seen.items() if occurred)
