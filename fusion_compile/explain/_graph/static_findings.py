"""Problems that a captured graph shows without a run and without a GPU."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fusion_compile._program.program import Program
from fusion_compile.explain import _compat
from fusion_compile.explain._findings import deduplicate
from fusion_compile.explain._graph.costs import is_alias, mutated, tensors_of
from fusion_compile.explain._graph.numpy_arrays import find_numpy, lines_of_numpy
from fusion_compile.explain._run.use_sites import makes_without_device
from fusion_compile.passes import Finding
from fusion_compile.passes._compat import OpOverload
from fusion_compile.passes._graph import RANDOM, op_name
from fusion_compile.passes._user_frame import user_line

_FACTORIES = {"arange", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn"}
_FACTORIES |= {"randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}


def find_in_program(program: Program) -> tuple[Finding, ...]:
    """Find host syncs, operators that no CUDA graph can hold, unmarked writes, CPU tensors, ignored checkpoints."""
    found = [*program.findings(thorough=not program.not_in_aten), *_moves_to_cpu(program), *_checkpointing(program)]
    found += find_numpy(program.graph.graph, program.input_names)
    if not program.not_in_aten:
        by_numpy = lines_of_numpy(program.graph.graph)
        made = find_cpu_tensors(program.aten.graph, program.graph.graph, program.input_names)
        found += [f for f in made if f.where not in by_numpy]
        found += _unmarked_mutations(program)
    return deduplicate(found)


def find_python_scalars(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Find floats among the arguments of `fn`. The first value is compiled in as a constant; another one recompiles."""
    names = argument_names(fn)
    named = {names[i] if i < len(names) else f"argument {i}": a for i, a in enumerate(args)} | dict(kwargs)
    return tuple(
        Finding(
            "python_scalar",
            name,
            defined_at(fn),
            "A Python float is compiled into the program. With another value the program is compiled again and then "
            "takes the value as a tensor on the CPU, which no CUDA graph can hold.",
            f"Pass {name} as a 0-dim tensor on the device.",
            "warning",
        )
        for name, value in named.items()
        if isinstance(value, float)
    )


def argument_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the positional arguments of `fn`; empty if its signature is not known."""
    try:
        parameters = inspect.signature(getattr(fn, "forward", fn)).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def defined_at(fn: Callable[..., Any]) -> str:
    """Return ``file:line`` where `fn`, or a module's forward, is defined; "" if it is not written in Python."""
    function = inspect.unwrap(getattr(fn, "forward", fn))
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def written_inputs(program: Program) -> dict[str, str]:
    """Return the inputs of `program` that its ATen graph writes in place, each with the user's line that does it."""
    memory: dict[fx.Node, fx.Node] = {}
    written_at: dict[str, str] = {}
    for node in program.aten.graph.nodes:
        sources = node.all_input_nodes
        if sources and (is_alias(node) or node.target is operator.getitem or mutated(node)):
            memory[node] = memory.get(sources[0], sources[0])
        for written in mutated(node):
            root = memory.get(written, written)
            if root.op == "placeholder":
                written_at.setdefault(root.name, user_line(node))
    return written_at


def _unmarked_mutations(program: Program) -> list[Finding]:
    """Find inputs that the graph writes although they are not marked to keep their addresses."""
    unmarked = {n.name for n in program.graph.graph.find_nodes(op="placeholder") if not _compat.is_marked_static(n)}
    names = program.input_names
    written_at = {name: line for name, line in written_inputs(program).items() if name in unmarked}
    lines: dict[str, list[str]] = {}
    for name, line in written_at.items():
        lines.setdefault(line or name, []).append(names.get(name, name))
    return [_unmarked(inputs, "" if line in written_at else line) for line, inputs in lines.items()]


def _unmarked(inputs: Sequence[str], where: str) -> Finding:
    """Make one finding of all inputs that one line writes: a loop over a model's momenta writes hundreds."""
    one = len(inputs) == 1
    return Finding(
        "unmarked_mutation",
        inputs[0] if one else f"{inputs[0]} and {len(inputs) - 1} more",
        where,
        f"The program writes {'this input' if one else f'these {len(inputs)} inputs'} in place. torch skips the CUDA "
        f"graph unless {'the input is' if one else 'all of them are'} marked to keep "
        f"{'its address' if one else 'their addresses'}.",
        "Call torch._dynamo.mark_static_address(tensor, guard=False) once before the first call, hold the tensor as a "
        "parameter or buffer of a module, or return the new value instead.",
    )


def find_cpu_tensors(graph: fx.Graph, captured: fx.Graph | None, names: Mapping[str, str]) -> tuple[Finding, ...]:
    """Find tensors on the CPU in a program for a GPU.

    `graph`: in ATen's operators. `names`: of its inputs. `captured`: the captured graph. For a program traced on the
    CPU it shows the tensors that would be on the CPU on any machine: those made without ``device=`` or with
    ``device="cpu"``. Where the captured graph is in ATen's operators itself, which all have a device, the line of
    source tells. A tensor that nothing reads is not in the program.
    """
    if any(t.device.type == "cuda" for n in graph.nodes for t in tensors_of(n)):
        made = [n for n in graph.nodes if _comes_from_the_cpu(n)]
    else:
        made = [n for n in (captured.nodes if captured else ()) if _is_made_on_the_cpu(n)]
    made = [n for n in made if n.users or n.op == "placeholder"]
    return tuple(
        Finding(
            "cpu_tensor",
            names.get(node.name, op_name(node.target)),
            user_line(node),
            "This tensor is on the CPU inside a program for the GPU. Operators that read it cannot be in a CUDA graph, "
            "and each use copies it to the device.",
            "Create it on the device (device=x.device, x.new_zeros, torch.zeros_like), or once outside the program.",
        )
        for node in made
    )


def _comes_from_the_cpu(node: fx.Node) -> bool:
    """Whether `node` brings in a tensor on the CPU. A tensor that is copied to the CPU is a wait, another finding."""
    if node.op == "output" or not any(t.device.type == "cpu" for t in tensors_of(node)):
        return False
    return not any(True for source in node.all_input_nodes for _ in tensors_of(source))


def _moves_to_cpu(program: Program) -> list[Finding]:
    """Find ``x.to("cpu")``, which a trace on the CPU does not show as a copy."""
    return [
        Finding(
            "host_sync",
            "tensor.to('cpu')",
            user_line(node),
            "It copies from the device to the CPU and waits for the copy.",
            "Keep the tensor on its device. Return it from the program and copy it afterwards.",
        )
        for node in program.graph.graph.nodes
        if node.op == "call_method" and node.target == "to" and "cpu" in (*node.args[1:], *node.kwargs.values())
    ]


def _is_made_on_the_cpu(node: fx.Node) -> bool:
    if node.op != "call_function" or op_name(node.target) not in _FACTORIES:
        return False
    if isinstance(node.target, OpOverload):
        return makes_without_device(user_line(node), op_name(node.target))
    made = getattr(node.target, "__module__", None) in ("torch", None) or str(node.target).startswith("<built-in")
    device = node.kwargs.get("device")
    return made and (device is None or device == "cpu") and torch.get_default_device().type == "cpu"


def _checkpointing(program: Program) -> list[Finding]:
    """Find checkpointed calls whose backward is in the same graph and does not recompute them."""
    found = []
    calls = [n for n in program.graph.graph.nodes if "activation_checkpoint" in str(n.target)]
    if not calls or not program.backwards:
        return []
    tagged = any({"remat_pass_tag", "phase"} & set(n.meta.get("custom") or ()) for n in program.graph.graph.nodes)
    for call in calls:
        inside = program.graph.get_submodule(str(call.args[0].target)) if isinstance(call.args[0], fx.Node) else None
        random = _first_random(inside) if isinstance(inside, fx.GraphModule) else None
        if random is not None:
            found.append(
                Finding(
                    "rng_in_checkpoint",
                    op_name(random.target),
                    user_line(random) or user_line(call),
                    "It draws random numbers in a checkpointed call whose backward is in the same graph. torch cannot "
                    "draw the same numbers again there and refuses the program.",
                    "Move the dropout out of the checkpointed call.",
                )
            )
        elif not tagged and not _compat.recomputes_untagged_backwards():
            found.append(
                Finding(
                    "checkpoint_ignored",
                    "checkpoint",
                    user_line(call),
                    "This torch recomputes checkpointed activations only if the backward carries a tag. This backward "
                    "has none, so all activations are kept.",
                    'Take the gradient under torch.fx.traceback.annotate({"remat_pass_tag": "is_backward"}), or use '
                    "compile_training_step, which does.",
                    "warning",
                )
            )
    return found


def _first_random(module: fx.GraphModule) -> fx.Node | None:
    node: fx.Node
    for node in module.graph.nodes:
        if RANDOM in getattr(node.target, "tags", ()) or op_name(node.target) in _RANDOM:
            if node.kwargs.get("training", True) is False or (len(node.args) > 2 and node.args[2] is False):
                continue
            return node
    return None


_RANDOM = {"bernoulli", "dropout", "dropout_", "multinomial", "normal", "poisson", "rand", "rand_like", "randint"}
_RANDOM |= {"randint_like", "randn", "randn_like", "randperm", "alpha_dropout", "feature_dropout"}
