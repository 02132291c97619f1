"""Find operators that make the CPU wait for the device, or that a CUDA graph cannot record.

    if mask.any(): …       finding: _local_scalar_dense at model.py:7, use torch.where instead of if
    x[mask]                finding: index at model.py:9, use a product with the mask

Torch's own lists are incomplete (``linalg.eigh`` is in none), so this module keeps a table, each row with its reason
and its remedy. It reads ATen graphs (from make_fx, export or AOTAutograd) and Dynamo's graphs, whose nodes are still
``torch.linalg.eigh`` and ``tensor.item()``, and it follows control-flow subgraphs. Nothing is changed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, fx

from ._compat import OpOverload
from ._finding import Finding
from ._graph import op_name, value_of
from ._user_frame import user_line

Kind = Literal["host_sync", "capture_unsafe"]


_Row = tuple[Kind, str, str]

_READ: _Row = (
    "host_sync",
    "it brings a value to the host, which waits for the device to finish everything before it.",
    "Keep the value as a tensor: torch.where instead of if, a 0-dim tensor instead of a number.",
)
_SHAPE: _Row = (
    "host_sync",
    "the shape of its result depends on the data, so the host waits for the count.",
    "Use torch.where or a product with the mask, which keep the shape.",
)
_RANGE: _Row = (
    "host_sync",
    "without bounds it reads the smallest and the largest value on the host.",
    "Give min= and max=, which differ.",
)
_COMPARE: _Row = (
    "host_sync",
    "it gives a Python bool, so the host waits for the comparison.",
    "Use (a == b).all() and keep the result on the device.",
)
_CPU: _Row = (
    "host_sync",
    "it copies from the device to the CPU and waits for it.",
    "Keep the tensor on its device; return it from the program and copy it afterwards.",
)
_CHECKED: _Row = (
    "host_sync",
    "it reads the solver's error code on the host.",
    "Use the _ex variant with check_errors=False and test its info tensor on the device.",
)
_SOLVER: _Row = (
    "capture_unsafe",
    "its CUDA solver synchronises or allocates outside the graph, so it cannot be captured.",
    "Use matrix products, QR or Cholesky instead, or put it in a custom operator tagged torch.Tag.cudagraph_unsafe.",
)
_BRANCH: _Row = (
    "capture_unsafe",
    "its predicate is read on the host to choose a branch, and a CUDA graph records only one of them.",
    "Compute both branches and choose with torch.where.",
)
_RANDOM_COUNT: _Row = (
    "capture_unsafe",
    "its result has a data-dependent number of elements.",
    "Give output_size=, or write it with a fixed shape.",
)

_ROWS: tuple[tuple[_Row, tuple[str, ...]], ...] = (
    (_READ, ("_local_scalar_dense", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")),
    (_SHAPE, ("nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique", "_unique2", "unique", "unique_dim")),
    (_SHAPE, ("unique_consecutive", "unique_dim_consecutive", "bincount", "combinations")),
    (_COMPARE, ("is_nonzero", "equal", "allclose")),
    (_CPU, ("cpu",)),
    (
        _CHECKED,
        ("_linalg_check_errors", "linalg_cholesky", "cholesky", "linalg_inv", "inverse", "linalg_solve", "solve"),
    ),
    (_CHECKED, ("linalg_lu_factor", "linalg_ldl_factor", "linalg_tensorinv", "linalg_tensorsolve")),
    (_SOLVER, ("linalg_eigh", "_linalg_eigh", "linalg_eigvalsh", "linalg_eig", "_linalg_eigvals", "linalg_eigvals")),
    (
        _SOLVER,
        ("linalg_svd", "_linalg_svd", "svd", "linalg_svdvals", "linalg_pinv", "linalg_matrix_rank", "linalg_lstsq"),
    ),
    (
        _SOLVER,
        ("linalg_inv_ex", "_linalg_solve_ex", "linalg_solve_ex", "linalg_lu", "linalg_lu_factor_ex", "linalg_cond"),
    ),
    (
        _SOLVER,
        ("_linalg_det", "linalg_det", "_linalg_slogdet", "linalg_slogdet", "logdet", "det", "linalg_ldl_factor_ex"),
    ),
    (_BRANCH, ("cond", "while_loop")),
    (_RANDOM_COUNT, ("repeat_interleave",)),
)
_TABLE: dict[str, _Row] = {name: row for row, names in _ROWS for name in names}


def find_host_syncs(graph_module: fx.GraphModule) -> tuple[Finding, ...]:
    """Find all host syncs in a graph and in the subgraphs of its control flow.

    Args:
        graph_module: An ATen graph or a Dynamo graph; it stays as it is.

    Returns:
        Findings of the kinds "host_sync" and "capture_unsafe", in graph order, one for each node.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import find_host_syncs
        >>> [(f.kind, f.op) for f in find_host_syncs(make_fx(torch.nonzero, tracing_mode="fake")(torch.ones(2)))]
        [('host_sync', 'aten.nonzero.default')]
    """
    findings = []
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                row = _row_of(node)
                if row is not None:
                    kind, why, remedy = row
                    findings.append(
                        Finding(kind, _written(node), user_line(node), f"{why[0].upper()}{why[1:]}", remedy)
                    )
    return tuple(findings)


def matters_on_a_gpu_alone(finding: Finding) -> bool:
    """Whether `finding` is a linear solver, which waits or cannot be captured on a GPU. On a CPU nothing waits: each
    operator is over when it returns, and a singular matrix is the error that it is in the ordinary loop."""
    return any(finding.why.lower() == why.lower() for _, why, _ in (_CHECKED, _SOLVER))


def _row_of(node: fx.Node) -> _Row | None:
    if node.op not in ("call_function", "call_method"):
        return None
    name = op_name(node.target)
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "getitem", "setitem"):
        return _SHAPE if _has_mask(node) else None
    if name in ("_to_copy", "to", "copy_"):
        return _CPU if _leaves_device(node) else None
    if name == "repeat_interleave" and _is_sized(node):
        return None
    if name == "histc":
        return None if _has_bounds(node) else _RANGE
    return _TABLE.get(name)


def _has_mask(node: fx.Node) -> bool:
    """Whether a boolean mask selects elements; assigning one number to them is masked_fill and needs no count."""
    indices = node.args[1] if len(node.args) > 1 else ()
    group = indices if isinstance(indices, (tuple, list)) else (indices,)
    values = [value_of(i) for i in group if isinstance(i, fx.Node)]
    if not any(isinstance(v, Tensor) and v.dtype in (torch.bool, torch.uint8) for v in values):
        return False
    if len(node.args) < 3:
        return True
    assigned = value_of(node.args[2]) if isinstance(node.args[2], fx.Node) else node.args[2]
    return isinstance(assigned, Tensor) and assigned.dim() > 0


def _leaves_device(node: fx.Node) -> bool:
    """Whether `node` copies to the CPU; a tensor that is known to be there already does not count."""
    source = next(iter(node.all_input_nodes), None)
    target = value_of(node)
    asked = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (torch.device, str))]
    to_cpu = any(str(a).partition(":")[0] == "cpu" for a in asked) or (
        isinstance(target, Tensor) and target.device.type == "cpu"
    )
    if not to_cpu or source is None:
        return False
    before = value_of(node.all_input_nodes[-1] if op_name(node.target) == "copy_" else source)
    return isinstance(before, Tensor) and before.device.type != "cpu"


def _is_sized(node: fx.Node) -> bool:
    """Whether repeat_interleave repeats by a number, or knows the size of its result."""
    repeats = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    return isinstance(repeats, int) or node.kwargs.get("output_size") is not None


def _has_bounds(node: fx.Node) -> bool:
    """Whether histc is given the range that it counts in."""
    low = node.args[2] if len(node.args) > 2 else node.kwargs.get("min", 0)
    high = node.args[3] if len(node.args) > 3 else node.kwargs.get("max", 0)
    return isinstance(low, int | float) and isinstance(high, int | float) and low != high


def _written(node: fx.Node) -> str:
    """The operator as a reader would write it: ``aten.nonzero.default``, ``tensor.item()``, ``torch.linalg_eigh``."""
    if node.op == "call_method":
        return f"tensor.{node.target}()"
    if isinstance(node.target, OpOverload):
        return str(node.target)
    return op_name(node.target)
