"""Explain a sampler: its graph by binding time, and for each value why it was or was not hoisted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fusion_compile._sampler.module import SamplerModule
from fusion_compile._sampler.program import SamplerProgram
from fusion_compile.explain._environment import environment
from fusion_compile.explain._explanation import Explanation
from fusion_compile.explain._facts import Decision, GraphFacts, HoistedValue, Hoisting, PassFacts, Section
from fusion_compile.explain._findings import deduplicate
from fusion_compile.explain._graph.costs import flops, is_alias, tensors_of, touched
from fusion_compile.explain._graph.graph_facts import graph_facts
from fusion_compile.explain._graph.roofline import Roofline, roofline
from fusion_compile.explain._show.summary import summarize
from fusion_compile.passes import BindingTime, Finding, binding_times, find_host_syncs, format_node

_MEANING = {
    BindingTime.CONST: "It depends on weights alone, so it is known once.",
    BindingTime.STEP: "It depends on the timestep and weights, so it is known once per schedule.",
    BindingTime.REQUEST: "It depends on the request and weights, so it is known once per request.",
    BindingTime.STEP_REQUEST: "It depends on timestep and request, so it is known once per request for all steps.",
    BindingTime.LIVE: "It depends on the latent, so it is known at the step itself.",
}
_REGION = {BindingTime.CONST: "table", BindingTime.STEP: "table", BindingTime.LIVE: "body"}
_LONGEST_CHAIN = 30


def explain_sampler(sampler: SamplerModule, device: str | None) -> Explanation:
    """Explain `sampler` with one graph for each recent combination of shapes, split into table, prologue and body."""
    programs = list(sampler._programs.values())
    placed = next((p.device for p in sampler.model.parameters()), torch.device("cpu"))
    line = roofline(device, placed)
    findings = deduplicate(
        (
            *(f for p in programs for f in find_host_syncs(p.split.graph_module)),
            *(f for p in programs for f in _not_captured(p)),
        )
    )
    graphs, values, passes, sections = [], [], [], []
    for i, program in enumerate(programs):
        whole, hoisted = program.split.graph_module, program.split.hoisted
        times = binding_times(whole.graph, program.split.times)
        graphs.append(_facts(f"program {i}", program, times, line, findings))
        values += _values(program, times)
        body = hoisted.body.graph_module.graph
        listings = ([format_node(n) for n in graph.nodes] for graph in (whole.graph, body))
        passes.append(PassFacts.of(hoisted.report, *listings))
    for report in sampler.report.programs:
        head, *lines = str(report).splitlines()
        rows = tuple((text[:12].strip(), text[12:].strip()) for text in (line[2:] for line in lines))
        sections.append(Section(head, ("", ""), rows))
    notes = () if programs else ("not called yet, nothing is known: call the sampler once, or pass example_inputs.",)
    return Explanation(
        f"sampler of {type(sampler.model).__name__}, {len(programs)} {'program' if len(programs) == 1 else 'programs'}",
        "sampler",
        environment(placed.type, str(line)),
        summary=summarize(findings, graphs, captured=bool(programs)),
        findings=findings,
        sections=tuple(sections),
        graphs=tuple(graphs),
        passes=tuple(passes),
        hoisting=Hoisting(tuple(values)) if programs else None,
        notes=notes,
    )


def _not_captured(program: SamplerProgram) -> list[Finding]:
    """A finding if the loop is not the CUDA graph that the sampler's mode asks for."""
    if program.not_captured is None:
        return []
    remedy = "Remove it from the loop, or pass mode='max-autotune-no-cudagraphs' to say that this is meant."
    return [Finding("cudagraph_skip", "CUDA graph", "", f"None was recorded: {program.not_captured}", remedy)]


def _facts(
    name: str,
    program: SamplerProgram,
    times: Mapping[fx.Node, BindingTime],
    line: Roofline,
    findings: tuple[Finding, ...],
) -> GraphFacts:
    in_body = _body_names(program)
    return graph_facts(
        name,
        program.split.graph_module,
        line,
        region=lambda n: "body" if n.name in in_body else _REGION.get(times[n], "prologue"),
        input_names=program.split.full_names,
        findings=findings,
        times={n.name: time for n, time in times.items()},
        root="model.",
    )


def _values(program: SamplerProgram, times: Mapping[fx.Node, BindingTime]) -> list[HoistedValue]:
    """The decision on each call and each weight of the whole graph."""
    names, hoisted = program.split.full_names, program.split.hoisted
    in_body = _body_names(program)
    declined = {d.node: d.reason for d in hoisted.report.declined}
    read_by_body = {str(n) for n in hoisted.body.inputs}
    values = []
    for node, time in times.items():
        size = sum(map(touched, tensors_of(node)))
        if node.op == "call_function":
            values.append(_of_call(node, time, times, in_body, declined, hoisted.residuals, size))
        elif node.op == "placeholder" and node.name in names:
            freed = node.name not in read_by_body
            readers = ", ".join(dict.fromkeys(u.name for u in node.users if u.name in in_body)) or "nothing"
            reason = (
                "No step of the loop reads it: release_weights() gives its memory back."
                if freed
                else f"The loop reads it at every step, in {readers}."
            )
            values.append(
                HoistedValue(
                    names[node.name],
                    "parameter",
                    time.name.lower(),
                    () if freed else tuple(_reaching(node, in_body)),
                    "weight_freed" if freed else "weight_kept",
                    reason,
                    size,
                    flops=0,
                    frees_bytes=size if freed else 0,
                )
            )
    return values


def _of_call(
    node: fx.Node,
    time: BindingTime,
    times: Mapping[fx.Node, BindingTime],
    in_body: frozenset[str],
    declined: Mapping[str, str],
    residuals: Mapping[str, BindingTime],
    size: int,
) -> HoistedValue:
    decision: Decision
    if time is BindingTime.LIVE:
        decision, why = "live", declined.get(node.name, "")
    elif node.name in in_body:
        decision = "recomputed"
        cheap = "It is a view, which costs nothing where it is read."
        if not is_alias(node):
            cheap = "It is cheaper to compute again at every step than to keep and read."
        why = declined.get(node.name, cheap)
    else:
        decision = "hoisted"
        why = "The loop reads its row." if node.name in residuals else "Only what is hoisted reads it."
    reason = f"{_MEANING[time]} {why}".strip()
    return HoistedValue(
        node.name, "node", time.name.lower(), tuple(_because(node, times)), decision, reason, size, flops(node), 0
    )


def _because(node: fx.Node, times: Mapping[fx.Node, BindingTime]) -> list[str]:
    """The path that decides when `node` is known: from an input down to `node`, always through the latest operand."""
    chain = [node]
    while chain[-1].all_input_nodes and len(chain) < _LONGEST_CHAIN:
        latest = max(chain[-1].all_input_nodes, key=lambda n: times[n].value)
        if times[latest] is BindingTime.CONST:
            break
        chain.append(latest)
    return [n.name for n in reversed(chain)]


def _reaching(weight: fx.Node, in_body: frozenset[str]) -> list[str]:
    """The first calls of the loop that a weight flows through."""
    chain = [weight]
    while (following := next((u for u in chain[-1].users if u.name in in_body), None)) and len(chain) < 4:
        chain.append(following)
    return [n.name for n in chain[1:]]


def _body_names(program: SamplerProgram) -> frozenset[str]:
    whole, hoisted = program.split.graph_module, program.split.hoisted
    known = {n.name for n in whole.graph.nodes if n.op == "call_function"}
    return frozenset(n.name for n in hoisted.body.graph_module.graph.nodes if n.op == "call_function") & known
