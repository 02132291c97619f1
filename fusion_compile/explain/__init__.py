"""Reads what was compiled and says what it is; never changes it."""

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from fusion_compile.explain._explanation import Explanation as Explanation


def explain(
    obj: Any,
    *args: Any,
    device: str | None = None,
    run: bool = True,
    calls: Sequence[tuple[Any, ...]] = (),
    backend: str = "inductor",
    **kwargs: Any,
) -> Explanation:
    """What was captured, what it costs, what went wrong, and why.

    `obj`: a `TrainingStep` (with a batch it is also watched taking a step, and then put back), a sampler, a
    ``torch.export.ExportedProgram``, an ``fx.GraphModule`` whose nodes carry fake tensors or with its inputs in
    `args`, or any callable or module, compiled or not, with the `args` and `kwargs` of one call. `device`: whose peaks
    the times assume (``"h100"``, …); default the GPU at hand, or a CPU core. `run`: given inputs, also compile it
    (a callable with `backend`) and watch it run, on `args` and then on each of `calls`, which shows graph breaks,
    recompiles, kernels and CUDA graphs; the tensors that it is given and its modules' own are as before afterwards.

    Raises TypeError for anything else and ValueError for an unknown device.
    """
    if getattr(type(obj), "explain", None) is not None:
        from fusion_compile.explain._subjects.watched import explain_compiled

        return explain_compiled(obj, args, kwargs, device=device, run=run, calls=calls)
    if isinstance(obj, ExportedProgram):
        from fusion_compile.explain._subjects.exported import explain_exported

        return explain_exported(obj, device)
    if isinstance(obj, fx.GraphModule):
        from fusion_compile.explain._subjects.exported import explain_graph_module

        return explain_graph_module(obj, args, kwargs, device)
    if callable(obj) and (args or kwargs):
        from fusion_compile.explain._subjects.callables import explain_callable

        return explain_callable(obj, args, kwargs, device=device, run=run, calls=calls, backend=backend)
    raise TypeError(
        f"explain() got a {type(obj).__name__}{' without inputs' if callable(obj) else ''}; give what "
        f"compile_training_step() or optimize_sampler() returned, an ExportedProgram, a GraphModule, or a callable "
        f"with the inputs of one call: explain(model, x)."
    )
