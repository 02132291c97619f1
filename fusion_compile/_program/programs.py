"""Compiled programs by key: compiled at the first call, never recompiled at a later one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from fusion_compile import _compat
from fusion_compile._program import compilers_warnings
from fusion_compile._program._compat import numbers_in_tensors_are_tensors
from fusion_compile._program.beside_its_graph import Beside, BesideItsGraph
from fusion_compile._program.lower import lower, no_recompile
from fusion_compile._program.memory.activations import activations_kept
from fusion_compile._program.memory.schedule import Schedule, written_into
from fusion_compile._program.program import Program
from fusion_compile._progress import stage


class GraphRefused(ValueError):
    """An observer refused a captured graph, `program`, before anything was compiled or run."""

    def __init__(self, sentence: str, program: Program) -> None:
        super().__init__(sentence)
        self.program = program


class Programs:
    """Compile functions, each once by its key, and run them.

    `activations`: the share of activations that is kept; None for all. `captured`: the graph of each compiled function,
    in the order of compilation; ``mode="eager"`` captures none. A function that fails at its first call is forgotten.
    """

    def __init__(self, backend: str, activations: float | None = None) -> None:
        self.backend, self.activations = backend, activations
        self.captured: dict[Hashable, Program] = {}
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._graphs: dict[Hashable, BesideItsGraph] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._compiled

    def forget(self) -> None:
        """Drop every compiled function; what was captured stays known."""
        self._compiled.clear()
        self._graphs.clear()

    def get(self, key: Hashable) -> Callable[..., Any] | None:
        """The function of `key`, which raises RuntimeError where it does not fit; None if there is none."""
        compiled = self._compiled.get(key)
        if compiled is None:
            return None

        def run(*given: Any) -> Any:
            with no_recompile():
                return compiled(*given)

        return run

    def keep(self, key: Hashable, function: Callable[..., Any]) -> None:
        """Keep a function that was compiled elsewhere."""
        self._compiled[key] = function

    def drop(self, key: Hashable) -> None:
        """Forget one function and what was captured of it."""
        del self._compiled[key]
        self.captured.pop(key, None)
        self._graphs.pop(key, None)

    def run_graph(self, key: Hashable, *given: Any) -> bool:
        """Run the graph of `key`, operator by operator; whether it was kept."""
        if (kept := self._graphs.get(key)) is None:
            return False
        kept.runs_graph = True
        try:
            return self.rerun(key, *given)
        finally:
            kept.runs_graph = False

    def unguarded(self, key: Hashable) -> Callable[..., Any] | None:
        """What a graph was compiled into, as a function of the graph's inputs in order, which checks nothing; None
        where it was not compiled `beside` its graph."""
        kept = self._graphs.get(key)
        return None if kept is None else kept.compiled

    def forget_graph(self, key: Hashable) -> None:
        """Keep only what was compiled from the graph of `key`."""
        if (kept := self._graphs.pop(key, None)) is not None:
            kept.forget_graph()

    def rerun(self, key: Hashable, *given: Any) -> bool:
        """Run the function of `key` if there is one, and say whether there was. RuntimeError if it does not fit."""
        if (compiled := self._compiled.get(key)) is None:
            return False
        with no_recompile():
            compiled(*given)
        return True

    def compile(
        self,
        key: Hashable,
        function: Callable[..., Any],
        *given: Any,
        mode: str,
        what: str,
        check: Callable[[Program], None] | None = None,
        beside: Beside | None = None,
        dynamic: bool = False,
    ) -> Any:
        """Compile `function` by its first call, on `given`, keep it under `key`, and return what that call does.

        `what`: what the progress line says is compiled. `check` is called with the captured graph before the backend
        sees it, and may raise ValueError to refuse it; nothing has run then. `beside.before_first` is called when all
        is compiled and nothing has run, with what runs the captured graph uncompiled, and what runs the compiled
        function; it may raise, and what it makes of the tensors is there for the first run. `run_graph` does the same
        later, until `forget_graph`. `beside.around_each`: what is around every run. `dynamic`: sizes
        that ``_compat.mark_symbolic`` marked are symbols.
        """

        # torch keeps every backend, and beside a function's code, where the collector of cycles does not look. What
        # leads back from there to the function, its model and its state is therefore taken away again.
        lent: dict[str, Callable[..., Any]] = {}
        schedule = Schedule()

        def observe(graph: torch.fx.GraphModule, inputs: list[Any]) -> None:
            program = Program(graph, schedule=schedule)
            if check is not None:
                check(program)
            self.captured[key] = program

        def both(graph: torch.fx.GraphModule, compiled: Callable[..., Any]) -> Callable[..., Any]:
            assert beside is not None
            self._graphs[key] = BesideItsGraph(graph, compiled, *beside)
            return self._graphs[key]

        lent |= {"observe": observe, "both": both}
        run = lower(
            _compat.own_code(function),
            mode=mode,
            backend=self.backend,
            on_graph=lambda *seen: lent["observe"](*seen),
            beside=None if beside is None else lambda *made: lent["both"](*made),
            dynamic=dynamic,
        )
        try:
            with (
                stage(f"compiling {what} ({mode if self.backend == 'inductor' else self.backend})"),
                _compat.shapes_as_the_kernels_have_them(),
                numbers_in_tensors_are_tensors(),
                activations_kept(self.activations),
                written_into(schedule),
                compilers_warnings.are_no_errors(),
            ):
                result = run(*given)
        except Exception as error:
            self.captured.pop(key, None)
            self._graphs.pop(key, None)
            if refusal := _compat.refusal_inside(error):
                raise refusal from None
            raise
        finally:
            lent.clear()
        self._compiled[key] = run
        return result
