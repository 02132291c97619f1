"""A CPU's kernel does not compute one number again for every few entries.

A bias correction is a number with a division and a root in it. Inductor writes it into the loop over the entries that
it is multiplied by, and no C++ compiler takes it out again, because what the loop stores may be what the number is read
from. So it is a loop of its own, before.
"""

from __future__ import annotations

from torch import Tensor, fx, ops

_APART = "inductor_realize_to_strides"
"""A mark of a node by which Inductor stores its result; an Inductor that does not know it computes as before."""
_DEAR = frozenset(
    {
        ops.aten.div.Tensor,
        ops.aten.reciprocal.default,
        ops.aten.sqrt.default,
        ops.aten.rsqrt.default,
        ops.aten.pow.Tensor_Scalar,
        ops.aten.pow.Tensor_Tensor,
        ops.aten.pow.Scalar,
        ops.aten.exp.default,
        ops.aten.log.default,
    }
)


def numbers_once(graph: fx.Graph) -> int:
    """Let Inductor compute apart every number of a CPU that takes long and is used by something larger. How many."""
    dear: set[fx.Node] = set()
    apart = 0
    for node in graph.nodes:
        if node.op != "call_function" or not _is_number(node):
            continue
        if node.target in _DEAR or any(n in dear for n in node.all_input_nodes):
            dear.add(node)
            if any(isinstance(user.meta.get("val"), Tensor) and not _is_number(user) for user in node.users):
                node.meta[_APART] = True
                apart += 1
    return apart


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu"
