"""Graph inspection: read what was compiled and report on it, without changing it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from fusion_compile.explain._arguments import first_invocation, further_calls
from fusion_compile.explain._explanation import Difference as Difference
from fusion_compile.explain._explanation import Explanation as Explanation
from fusion_compile.explain._subjects.registry import subject_of


def explain(
    obj: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    run: bool = True,
    calls: Sequence[tuple[Any, ...] | Callable[[], object]] = (),
    backend: str = "inductor",
) -> Explanation:
    """Report what was captured of a program, what it costs, what went wrong, and why.

    Afterwards the tensors in `args` and `kwargs`, the tensors and modes (train, eval) of modules that `obj` reaches,
    and torch's settings are as before. Other changes that the program makes, such as a list that grows, stay.

    Args:
        obj: One of

            - a training step: given a batch, it is called, watched and put back;
            - a sampler: given the inputs of a call, it is called and watched;
            - an ``ExportedProgram``: it is read, never run;
            - an ``fx.GraphModule``: it is read, never run. Its nodes carry fake tensors, or `args` are its inputs;
            - a callable or module, compiled or not, with the inputs of one call.
        args: Positional inputs of one call, as a tuple, as for ``torch.export.export``.
        kwargs: Keyword inputs of that call, as a dictionary.
        device: The device whose peak rates the roofline times (µs) assume: ``"h100"``, ``"h200"``, ``"a100"``,
            ``"b200"``, ``"l40s"``, ``"rtx4090"``, ``"mi300x"`` or ``"cpu"``. By default the GPU at hand, or one CPU
            core.
        run: Given inputs, also compile and run the program. Only a run shows graph breaks, recompiles, kernels and CUDA
            graphs.
        calls: Further calls after the first. Each is a tuple of positional inputs, or a pair ``(args, kwargs)``.
            Exactly two entries, a tuple and a dictionary with string keys, are always taken as a pair: write a call
            whose two positional inputs are a tuple and a dictionary as ``((inputs, options), {})``.
            A function among them is called without arguments between two calls, to change something:
            ``[model.eval, (x,), model.train, (x,)]``.
        backend: The ``torch.compile`` backend for a callable that is not compiled yet. ``"eager"`` is quick and reports
            no kernels.

    Returns:
        An explanation with findings, tables, graphs with the costs of every node (FLOP, bytes, µs), and the events of
        the run.

    Raises:
        TypeError: `obj` cannot be explained, or inputs are not in the form above, as in ``explain(model, x)``.
        ValueError: `device` is unknown, a GraphModule's inputs are missing, or `calls` ends with a function.

    Example:
        >>> import torch, fusion_compile as fc
        >>> explanation = fc.explain(lambda x: x.nonzero(), (torch.ones(3),), backend="eager")
        >>> [(finding.kind, finding.op) for finding in explanation.findings]
        [('host_sync', 'aten.nonzero')]
    """
    first, further = first_invocation(args, kwargs), further_calls(calls)
    given = bool(first.args or first.kwargs)
    if further and not given:
        raise TypeError(
            "explain() got calls without args; give the inputs of the first call too: explain(model, (x,))."
        )
    invocations = (first, *further) if given and run else ()
    if (subject := subject_of(obj)) is not None:
        from fusion_compile.explain._subjects.watched import explain_watched

        return explain_watched(obj, subject, invocations, device)
    if isinstance(obj, ExportedProgram):
        if given:
            raise TypeError(
                "explain() got inputs for an ExportedProgram, which is read and not run; leave them out: "
                "explain(program). To watch it run: explain(torch.compile(program.module()), args, kwargs)."
            )
        from fusion_compile.explain._subjects.exported import explain_exported

        return explain_exported(obj, device)
    if isinstance(obj, fx.GraphModule):
        if further:
            raise TypeError("explain() got calls for a GraphModule, which is read and not run; leave them out.")
        from fusion_compile.explain._subjects.exported import explain_graph_module

        return explain_graph_module(obj, first, device)
    if callable(obj) and given:
        from fusion_compile.explain._subjects.callables import explain_callable

        return explain_callable(obj, first, invocations, device=device, backend=backend)
    raise TypeError(
        f"explain() got a {type(obj).__name__}{' without inputs' if callable(obj) else ''}; give what "
        f"compile_training_step() or optimize_sampler() returned, an ExportedProgram, a GraphModule, or a callable "
        f"with the inputs of one call as a tuple: explain(model, (x,))."
    )
