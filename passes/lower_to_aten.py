"""Write a captured graph down in ATen operators, with its tags and source lines kept."""

from __future__ import annotations

import contextlib

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx


def lower_to_aten(module: fx.GraphModule) -> fx.GraphModule:
    """The ATen graph of a Dynamo graph, its ``torch.autograd.grad`` written out as the backward's operators.

    Before: ``loss -> autograd.grad(loss, [w])``; after: ``loss -> aten.mm, aten.sum, …``. `module` is run on the fake
    tensors in its placeholders' ``meta["example_value"]``: no memory, no arithmetic. Each node keeps the
    ``meta["custom"]`` and ``meta["stack_trace"]`` of the node it came from; those of the backward come from the call
    of ``autograd.grad``. Exact; changes nothing in `module`. Raises ValueError when a placeholder has no example.
    """
    examples = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if "example_value" not in node.meta:
                raise ValueError(
                    f"{node.name} has no meta['example_value']; lower_to_aten reads graphs captured by Dynamo."
                )
            examples.append(node.meta["example_value"])
    fake = next((e.fake_mode for e in examples if hasattr(e, "fake_mode")), contextlib.nullcontext())
    with fx.traceback.preserve_node_meta(), fake, torch.enable_grad():
        return make_fx(fx.Interpreter(module).run)(*examples)
