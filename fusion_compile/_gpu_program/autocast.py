"""What a GPU's autocast computes in fp32, in a graph that was captured under the CPU's, which does so with less.

Autocast is chosen by where a tensor lies, and a graph is captured on the CPU. The products of both are in half
precision, but under the CPU's a normalization of bf16 is computed in bf16, and on a GPU in fp32.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

_NAMES = (
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm "
    "native_layer_norm rms_norm group_norm norm cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss "
    "hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss "
    "multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss cross_entropy "
    "binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp interpolate prod softmax log_softmax cumprod "
    "cumsum vector_norm matrix_norm sum"
)
"""AT_FORALL_FP32 and the two lists behind it of ATen's autocast_mode.h, torch 2.13, by the names that Python's graphs
have for them."""
_IN_FP32 = frozenset(_NAMES.split(" "))
_KEPT = ("custom", "nn_module_stack", "stack_trace")


def cast_as_on_gpu(graph: fx.Graph, *, enabled: bool) -> None:
    """Cast to fp32, in place, what operators in regions of autocast read in half precision and a GPU computes in fp32.

    Args:
        graph: Dynamo's, captured on a CPU. A region inside a checkpointed call is not looked at.
        enabled: Whether autocast is on where the graph begins.
    """
    regions = [enabled]
    for node in list(graph.nodes):
        if _name(node) == "_enter_autocast":  # torch.amp.autocast, as Dynamo writes it
            device_type, _, on, *_ = node.args
            regions.append(bool(on) if device_type == "cpu" else regions[-1])
        elif _name(node) == "_exit_autocast":
            regions.pop()
        elif regions[-1] and _in_fp32(node):
            for read in [source for source in node.all_input_nodes if _is_half(source)]:
                with graph.inserting_before(node):
                    cast = graph.call_method("float", (read,))
                cast.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
                node.replace_input_with(read, cast)


def _name(node: fx.Node) -> str:
    """Of the function or method that `node` calls; "" where it calls none."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _in_fp32(node: fx.Node) -> bool:
    if node.target is operator.truediv:
        return not isinstance(node.args[0], fx.Node)  # torch divides a number by a tensor with a reciprocal
    return _name(node).removeprefix("linalg_") in _IN_FP32


def _is_half(node: fx.Node) -> bool:
    made = node.meta.get("example_value")
    return isinstance(made, Tensor) and made.dtype in (torch.float16, torch.bfloat16)
