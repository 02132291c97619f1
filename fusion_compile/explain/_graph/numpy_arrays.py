"""numpy inside a program: Dynamo writes it down as torch operators, which hides that numpy is on the CPU."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from fusion_compile.explain import _compat
from fusion_compile.passes import Finding
from fusion_compile.passes._graph import value_of
from fusion_compile.passes._user_frame import user_line


def find_numpy(graph: fx.Graph, names: dict[str, str]) -> tuple[Finding, ...]:
    """Find arrays that numpy computes or brings in, and tensors that are given to numpy.

    `graph`: captured by Dynamo. `names`: of its inputs. One finding for each line that hands an array to torch.
    """
    calls = {node: name for node in graph.nodes if (name := _compat.numpy_call(node))}
    given = {node for node in calls for source in node.all_input_nodes if _is_a_tensor(source, calls)}
    depends: set[fx.Node] = set()
    for node in calls:
        if node in given or any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    found: dict[str, Finding] = {}
    for node in calls:
        if node in given and not _was_copied(node):
            found.setdefault(user_line(node), _waits(node, calls[node]))
        elif node not in depends and _leaves_numpy(node, calls):
            found.setdefault(user_line(node), _made(node, f"np.{calls[node]}"))
    for node in graph.find_nodes(op="placeholder"):
        name = names.get(node.name, node.name)
        computed_before_a_break = name.startswith("___stack")  # the break is the finding
        if _compat.is_numpy_array(node) and _dimensions(node) and node.users and not computed_before_a_break:
            found.setdefault(node.name, _made(next(iter(node.users)), name))
    return tuple(found.values())


def lines_of_numpy(graph: fx.Graph) -> frozenset[str]:
    """Return the user's lines that call numpy."""
    return frozenset(user_line(node) for node in graph.nodes if _compat.numpy_call(node))


def _is_a_tensor(node: fx.Node, calls: Iterable[fx.Node]) -> bool:
    """Whether `node` is a tensor of the program and no array of numpy's."""
    return node not in calls and not _compat.is_numpy_array(node) and isinstance(value_of(node), Tensor)


def _was_copied(node: fx.Node) -> bool:
    """Whether a tensor was copied to the CPU before numpy got it; the copy is a finding of its own."""
    seen: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source in seen or source.op != "call_method":
            continue
        seen.add(source)
        if source.target == "cpu" or (source.target == "to" and "cpu" in map(str, source.args[1:])):
            return True
        if source.target in ("detach", "view_as", "resolve_conj", "resolve_neg", "contiguous"):
            waiting += source.all_input_nodes
    return False


def _leaves_numpy(node: fx.Node, calls: Iterable[fx.Node]) -> bool:
    return any(user.op in ("call_function", "call_method") and user not in calls for user in node.users)


def _dimensions(node: fx.Node) -> int:
    value = value_of(node)
    return value.dim() if isinstance(value, Tensor) else 0


def _made(node: fx.Node, op: str) -> Finding:
    return Finding(
        "cpu_tensor",
        op,
        user_line(node),
        "numpy has its arrays on the CPU. In a program for the GPU each call computes this one there and copies it to "
        "the device, and no CUDA graph can hold it.",
        "Compute it with torch on the device (torch.arange(n, device=x.device), torch.sin), or once in __init__ and "
        "keep it in a buffer.",
    )


def _waits(node: fx.Node, name: str) -> Finding:
    return Finding(
        "host_sync",
        f"np.{name}",
        user_line(node),
        "numpy needs the tensor on the CPU, so the CPU waits until the device has computed it.",
        "Use torch's operators, which stay on the device.",
    )
