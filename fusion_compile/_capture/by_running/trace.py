"""Capture by running: a function of tensors runs once on fake tensors; the operators that it calls are the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fusion_compile._capture.by_running import _compat
from fusion_compile._capture.by_running._compat import OpOverload
from fusion_compile._capture.by_running.settled_coins import SettledCoins
from fusion_compile._capture.by_running.symbolic_sizes import SymbolicSizes
from fusion_compile._compat import distributions_check_nothing, shapes_as_the_kernels_have_them


def run_on_fakes(
    fn: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    *,
    stack_traces: bool = True,
    symbols: SymbolicSizes | None = None,
) -> fx.GraphModule:
    """Capture `fn` by running it.

    Real Python runs, once, so `fn` may do what no bytecode reader follows: log, call a fused LSTM, keep tensors in
    attributes. What Python decides is decided once: the caller owes a watch over all that it read.

    Args:
        fn: Called with one tensor for each input, in order; what it writes into them in place is written down.
        inputs: Real tensors by label. Placeholder ``i`` gets ``meta["label"]``, and its fake tensor in ``meta["val"]``.
        stack_traces: Record the user's line at every node.
        symbols: Those of the sizes of `inputs` that are to be symbols.

    Returns:
        The graph in ATen operators, forward and backward alike. Real tensors that `fn` closes over are constants of
        the graph: the objects themselves, read at every run.

    Raises:
        RuntimeError: A constant of the graph is a fake tensor that an earlier run left behind: the program would
            compute from memory that nobody wrote.
    """
    with (
        _compat.as_the_ordinary_loop(),
        _compat.checkpoints_keep_their_masks(),
        shapes_as_the_kernels_have_them(),
        distributions_check_nothing(),
        SettledCoins(),
        contextlib.nullcontext() if symbols is None else symbols.noticed(),
    ):
        given = tuple(inputs.values()) if symbols is None else symbols.fakes
        graph = _compat.trace_on_fakes(fn, given, stack_traces=stack_traces, symbolic=symbols is not None)
    _give_backward_nodes_their_lines(graph)
    for label, node in zip(inputs, graph.graph.find_nodes(op="placeholder"), strict=True):
        node.meta["label"] = label
    refuse_fake_constants(graph)
    return graph


def no_checkpoint_is_reentrant() -> contextlib.AbstractContextManager[None]:
    """Inside, reentrant checkpointing, which ``torch.autograd.grad`` refuses, runs as the other kind."""
    return _compat.no_checkpoint_is_reentrant()


def modules_named(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, each captured node has the name of the module that called it, in ``meta["custom"]["module"]``."""
    return _compat.modules_named(model)


def _give_backward_nodes_their_lines(graph: fx.GraphModule) -> None:
    """Set stack and module of what autograd called to those of the forward operator that it differentiates.

    Both carry the sequence number of their autograd node. What was recomputed ran as Python and has its own line. Where
    it ran in torch's modules alone, its line is the forward's, too.
    """
    forward: dict[int, str] = {}
    modules: dict[int, str] = {}
    of_autograd: list[fx.Node] = []
    for node in graph.graph.nodes:
        if node.op != "call_function" or "seq_nr" not in node.meta:
            continue
        if _compat.is_of_autograd(node):
            of_autograd.append(node)
        else:
            forward.setdefault(node.meta["seq_nr"], node.meta.get("stack_trace") or "")
            modules.setdefault(node.meta["seq_nr"], (node.meta.get("custom") or {}).get("module", ""))
    calls = {n.meta.get("stack_trace") for n in of_autograd if not _is_recomputed(n)}
    for node in of_autograd:
        own = _is_recomputed(node) and node.meta.get("stack_trace") not in calls
        if not own and node.meta["seq_nr"] in forward:
            node.meta["stack_trace"] = forward[node.meta["seq_nr"]]
        custom = node.meta.get("custom") or {}
        if "module" not in custom and modules.get(node.meta["seq_nr"]):
            node.meta["custom"] = {**custom, "module": modules[node.meta["seq_nr"]]}  # nodes share the dictionary


def _is_recomputed(node: fx.Node) -> bool:
    return "recomputed" in (node.meta.get("custom") or {})


def constants(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that the graph reads besides its inputs, by the name under which it keeps them."""
    found: dict[str, Tensor] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value: Any = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            found[str(node.target)] = value
    return found


def lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that the graph holds, behind its other inputs, and return them in order.

    A compiler may write the numbers of a small constant into its code; those of an input it reads at every run. What
    ``torch.tensor(…)`` made inside stays a constant.
    """
    held = constants(graph)
    lifted: dict[int, tuple[Tensor, fx.Node]] = {}
    last = list(graph.graph.find_nodes(op="placeholder"))[-1]
    for node in list(graph.graph.find_nodes(op="get_attr")):
        tensor = held.get(str(node.target))
        if tensor is None or all("lift_fresh" in str(user.target) for user in node.users):
            continue
        if id(tensor) not in lifted:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(lifted)}")
            last.meta = {**node.meta, "label": f"constant/{len(lifted)}"}
            lifted[id(tensor)] = (tensor, last)
        node.replace_all_uses_with(lifted[id(tensor)][1])
        graph.graph.erase_node(node)
    # A compiler makes inputs of whatever the module still holds.
    for name in held.keys() - {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}:
        owner, _, attribute = name.rpartition(".")
        delattr(graph.get_submodule(owner), attribute)
    graph.recompile()
    return [tensor for tensor, _ in lifted.values()]


def refuse_fake_constants(graph: fx.GraphModule) -> None:
    """Raise RuntimeError if the graph holds a tensor without data."""
    for name, tensor in constants(graph).items():
        if _compat.is_fake(tensor):
            raise RuntimeError(
                f"the captured graph holds {name}, a {tensor.dtype} {list(tensor.shape)} tensor without data, which an "
                f"earlier trace left in the model or the loss. This is a fault of fusion_compile; please report it."
            )


def written_constants(graph: fx.GraphModule) -> list[Tensor]:
    """The constants that the graph writes in place, each once: state that no input carries."""
    held = constants(graph)
    found: dict[int, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            for root in _written(node):
                if root.op == "get_attr" and str(root.target) in held:
                    found[id(held[str(root.target)])] = held[str(root.target)]
    return list(found.values())


def _written(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes whose memory `node` writes, followed back through views."""
    arguments: Sequence[Any] = node.target._schema.arguments  # type: ignore[union-attr]
    for i, argument in enumerate(arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for one in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(one, fx.Node):
                    yield _owner(one)


def _owner(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and isinstance(node.target, OpOverload):
        first = node.target._schema.arguments[0] if node.target._schema.arguments else None
        viewed = first is not None and first.alias_info is not None
        if not viewed or not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node
