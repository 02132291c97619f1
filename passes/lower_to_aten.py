"""Write a captured graph in ATen operators, with its tags, modules and source lines kept.

    loss = torch.autograd.grad(loss, [w])   ->   aten.mm, aten.sum, … of the backward
    torch.nn.functional.silu(x)             ->   aten.silu(x)

The passes that cost and explain a training step read operators, and Dynamo's graph has functions.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from ._compat import number_of_gradient, tree_leaves
from ._graph import value_of

_TAG = "gradient_of"


def lower_to_aten(
    module: fx.GraphModule, *, gradients: bool = True, decompositions: Mapping[Any, Any] | None = None
) -> fx.GraphModule:
    """Lower a Dynamo graph to an ATen graph, with ``torch.autograd.grad`` written out as the backward's operators.

    Exact. `module` is run on the fake tensors recorded at its placeholders, which takes no memory and no arithmetic.
    Inputs keep their names. A checkpointed call is computed again where the backward needs it, and what computes it
    again has ``meta["custom"]["recomputed"]``, the number of the call. Each node keeps ``meta["custom"]``,
    ``meta["nn_module_stack"]`` and ``meta["stack_trace"]`` of the node it came from. A node of the backward has
    ``meta["autograd_backward"]``, and takes module and source line from the forward operator whose gradient it
    computes, or else from the call of ``autograd.grad``.

    Args:
        module: A graph captured by Dynamo, or an ATen graph; it stays as it is.
        gradients: Whether gradients were enabled where the graph begins.
        decompositions: Operators to be split up, each with the function that does it, as ``make_fx`` takes them.

    Returns:
        The ATen graph.

    Raises:
        ValueError: If a placeholder has no example.

    Example:
        >>> import torch
        >>> from fusion_compile.passes import format_graph, lower_to_aten
        >>> graphs = []
        >>> def keep(graph_module, inputs):
        ...     graphs.append(graph_module)
        ...     return graph_module.forward
        >>> _ = torch.compile(lambda x: torch.nn.functional.relu(x), backend=keep)(torch.ones(2))
        >>> print(format_graph(lower_to_aten(graphs[0]).graph))
        l_x_: float32[2] = input
        relu: float32[2] = aten.relu.default(l_x_)
        return [relu]
    """
    inputs = module.graph.find_nodes(op="placeholder")
    for node in inputs:
        if value_of(node) is None:
            raise ValueError(
                f"{node.name} has no meta['example_value']; lower_to_aten reads graphs captured by Dynamo."
            )
    examples = [value_of(node) for node in inputs]
    fake = next((e.fake_mode for e in examples if hasattr(e, "fake_mode")), contextlib.nullcontext())
    held = _held_tensors(module)

    def run(*given: Any) -> Any:
        interpreter = _Lowering(module, dict(zip(held, given, strict=False)))
        return interpreter.run(*given[len(held) :])

    with fx.traceback.preserve_node_meta(), fake, torch.set_grad_enabled(gradients):
        trace = make_fx(run, decomposition_table=None if decompositions is None else dict(decompositions))
        lowered = trace(*(_faked(tensor, fake) for tensor in held.values()), *examples)
    placeholders = lowered.graph.find_nodes(op="placeholder")
    for node, original in zip(placeholders[len(held) :], inputs, strict=True):
        node._rename(original.name)
        node.target = node.name
    _read_as_attributes(lowered, dict(zip(placeholders, held.items(), strict=False)))
    _give_backward_its_lines(lowered.graph)
    lowered.recompile()
    return lowered


def _held_tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph reads as attributes of its module, as those that an optimizer holds, by their names."""
    found = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if isinstance(value, Tensor):
            found[str(node.target)] = value
    return found


def _faked(tensor: Tensor, mode: Any) -> Tensor:
    """A stand-in for `tensor` in a trace under the fake tensor mode `mode`, or `tensor` itself if there is none."""
    faked: Tensor = mode.from_tensor(tensor, static_shapes=True) if hasattr(mode, "from_tensor") else tensor
    return faked


def _read_as_attributes(lowered: fx.GraphModule, held: dict[fx.Node, tuple[str, Tensor]]) -> None:
    """Make attributes of the placeholders in `held` again, so that the graph's inputs are those of the original."""
    for node, (name, tensor) in held.items():
        flat = name.replace(".", "_")
        setattr(lowered, flat, tensor)
        with lowered.graph.inserting_before(node):
            read = lowered.graph.get_attr(flat)
        read.meta = node.meta
        node.replace_all_uses_with(read)
        lowered.graph.erase_node(node)


class _Lowering(fx.Interpreter):
    """Runs a graph so that a trace of it has what the program does with gradients.

    The nodes that ``autograd.grad`` runs get the number of the forward operator whose gradient they compute. Tracing
    records the same number, ``seq_nr``, at the forward's nodes. A checkpointed call runs again where the backward needs
    what it computed, and those nodes get ``meta["custom"]["recomputed"]``, the number of the call counted from 1.
    """

    def __init__(
        self, module: fx.GraphModule, held: Mapping[str, Tensor], numbers: Iterator[int] | None = None
    ) -> None:
        super().__init__(module)
        self._held = held
        self._numbers = itertools.count(1) if numbers is None else numbers
        self.recomputes: dict[str, Any] = {}  # what the nodes of a run that recomputes have besides their own

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._held[target] if target in self._held else super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        self._mark()
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        self._mark()
        return super().call_method(target, args, kwargs)

    def _mark(self) -> None:
        if self.recomputes:
            meta = fx.traceback.get_current_meta()
            meta["custom"] = {**(meta.get("custom") or {}), **self.recomputes}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and "activation_checkpoint" in str(n.target):
            return self._checkpointed(n)
        if n.target is not torch.autograd.grad:
            return super().run_node(n)
        handles = []
        for gradient in _gradients(tree_leaves(self.fetch_args_kwargs_from_env(n)[0][0])):
            begin, end = _tagging(number_of_gradient(gradient))
            handles += [gradient.register_prehook(begin), gradient.register_hook(end)]
        try:
            return super().run_node(n)
        finally:
            for handle in handles:
                handle.remove()

    def _checkpointed(self, n: fx.Node) -> Any:
        inside, *inputs = self.fetch_args_kwargs_from_env(n)[0]
        number = next(self._numbers)
        runs = itertools.count()

        def body(*given: Any) -> Any:
            lowering = _Lowering(inside, {}, self._numbers)
            if next(runs):
                outer = fx.traceback.get_current_meta().get("custom") or {}
                lowering.recomputes = {k: v for k, v in outer.items() if k != _TAG} | {"recomputed": number}
            return lowering.run(*given)

        options = {"context_fn": chosen} if (chosen := inside.meta.get("_checkpoint_context_fn")) else {}
        return checkpoint(body, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _gradients(losses: list[Any]) -> Iterator[Any]:
    """Every node of autograd's graph below `losses`, each once."""
    waiting = [t.grad_fn for t in losses if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        gradient = waiting.pop()
        yield gradient
        for below, _ in gradient.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


def _tagging(number: int) -> tuple[Any, Any]:
    """Hooks that tag the nodes traced between them with `number`.

    They replace the dictionary and never write to it, because the captured node holds the same one.
    """

    def begin(*_: Any) -> None:
        meta = fx.traceback.get_current_meta()
        meta["custom"] = {**meta.get("custom", {}), _TAG: number}

    def end(*_: Any) -> None:
        meta = fx.traceback.get_current_meta()
        meta["custom"] = {k: v for k, v in meta.get("custom", {}).items() if k != _TAG}

    return begin, end


def _give_backward_its_lines(graph: fx.Graph) -> None:
    """Remove the tags, and copy module and source line from the first forward node of that number."""
    forward: dict[int, fx.Node] = {}
    for node in graph.nodes:
        custom = node.meta.get("custom") or {}
        if _TAG in custom:
            source = forward.get(custom[_TAG])
            node.meta["custom"] = {k: v for k, v in custom.items() if k != _TAG}
            node.meta["autograd_backward"] = True
            node.meta |= {k: source.meta[k] for k in ("nn_module_stack", "stack_trace") if source and k in source.meta}
        elif "recomputed" in custom:
            node.meta["autograd_backward"] = True
        elif node.op == "call_function" and "seq_nr" in node.meta:
            forward.setdefault(node.meta["seq_nr"], node)
