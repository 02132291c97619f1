"""The results of `explain`: an explanation and the difference of two, with the methods that show them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console

from fusion_compile._notebook import preformatted
from fusion_compile.explain._comparison import DifferenceFacts, compare
from fusion_compile.explain._facts import SCHEMA, VERSION, ExplanationFacts
from fusion_compile.explain._findings import identity
from fusion_compile.explain._show.diff_text import write_difference
from fusion_compile.explain._show.json_form import plain, read_json, rebuild, write_json
from fusion_compile.explain._show.text import WIDTH, write_text
from fusion_compile.explain._show.why import tell_why


@dataclass(frozen=True)
class Explanation(ExplanationFacts):
    """What `explain` found about a program, as plain data.

    ``print(explanation)`` gives plain text; `explanation.print()` adds colours on a terminal.

    Attributes:
        title: The program and its size in one line.
        kind: ``"training_step"``, ``"sampler"``, ``"exported_program"``, ``"graph_module"`` or ``"callable"``.
        environment: Versions, the program's device, and the device whose peak rates the times assume.
        summary: The most important facts, each marked good, bad or plain.
        findings: What breaks a promise (one graph, one replay, no wait) or costs time. Each has the user's line, the
            reason and the remedy. No two are duplicates.
        sections: Tables of text.
        graphs: Every captured graph: each node with its costs, and the memory over the graph in bytes.
        passes: The passes that ran, with the graph before and after each.
        runtime: Graph breaks, recompiles, kernels and CUDA graphs; None if nothing was run.
        hoisting: For a sampler, the decision about every node and weight; else None.
        notes: What a reader must know besides.
        peaks: For a training step that Inductor compiled on a CPU, the predicted highest point of memory of each
            program, and what is alive there.

    Example:
        >>> import torch, fusion_compile as fc
        >>> explanation = fc.explain(torch.nn.Linear(4, 2), (torch.ones(3, 4),), run=False)
        >>> explanation.title, sum(node.flops for node in explanation.graphs[0].nodes)
        ('Linear, 1 graph', 48)
    """

    def __str__(self) -> str:
        return _as_text(lambda console: write_text(self, console))

    def print(self) -> None:
        """Print to standard output, with colours if it is a terminal.

        Example:
            >>> import torch, fusion_compile as fc
            >>> fc.explain(torch.nn.ReLU(), (torch.ones(3),), run=False).print()  # doctest: +ELLIPSIS
            ReLU, 1 graph
            ...
        """
        _print(lambda console: write_text(self, console))

    def _repr_html_(self) -> str:
        return preformatted(str(self))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Return the explanation as data for `json.dumps`, in a versioned form that `from_json` reads.

        Args:
            path: Also write the JSON to this file. A reader sees the old file or the new one, never half of one.

        Returns:
            A dictionary; docs/explain.md lists its fields. Bytes are bytes, times are microseconds.

        Raises:
            OSError: `path` cannot be written.

        Example:
            >>> import torch, fusion_compile as fc
            >>> data = fc.explain(torch.nn.ReLU(), (torch.ones(3),), run=False).to_json()
            >>> data["schema"], data["version"]
            ('fusion_compile.explanation', 2)
        """
        data = {"schema": SCHEMA, "version": VERSION, **plain(self)}
        data["findings"] = [{"id": identity(f), **plain(f)} for f in self.findings]
        if path is not None:
            write_json(data, path)
        return data

    @staticmethod
    def from_json(source: Mapping[str, Any] | str | os.PathLike[str]) -> Explanation:
        """Read an explanation that `to_json` returned or wrote.

        Args:
            source: The data, or the path of the file.

        Returns:
            An explanation equal to the one that was written.

        Raises:
            OSError: The file cannot be read.
            ValueError: The source is not JSON, not an explanation, of another version, or incomplete.

        Example:
            >>> import torch, fusion_compile as fc
            >>> explanation = fc.explain(torch.nn.ReLU(), (torch.ones(3),), run=False)
            >>> fc.Explanation.from_json(explanation.to_json()) == explanation
            True
        """
        data = source if isinstance(source, Mapping) else read_json(source)
        name = "the data" if isinstance(source, Mapping) else str(source)
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise ValueError(f"{name} is no explanation; give what Explanation.to_json() returned or wrote.")
        if data.get("version") != VERSION:
            raise ValueError(
                f"{name} is an explanation of version {data.get('version')!r} and this fusion_compile reads version "
                f"{VERSION}; write it again with the installed version."
            )
        try:
            return rebuild(Explanation, data)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{name} is an explanation with parts missing ({error}); write it again.") from None

    def diff(self, other: ExplanationFacts) -> Difference:
        """Compare this explanation with a later one.

        Args:
            other: The later explanation.

        Returns:
            What was added, removed and changed. It is false if nothing differs.

        Raises:
            TypeError: `other` is no explanation.

        Example:
            >>> import torch, fusion_compile as fc
            >>> before = fc.explain(torch.nn.ReLU(), (torch.ones(3),), run=False)
            >>> after = fc.explain(torch.nn.GELU(), (torch.ones(3),), run=False)
            >>> sorted(delta.operator for delta in before.diff(after).regions)
            ['aten.gelu.default', 'aten.relu.default']
        """
        if not isinstance(other, ExplanationFacts):
            raise TypeError(f"diff() got a {type(other).__name__}; give another explanation.")
        return Difference(**vars(compare(self, other)))

    def why(self, name: str) -> str:
        """Tell where one value is computed, from which inputs, and at what cost.

        For a sampler's value, also tell when it is known, through which inputs, and why it was or was not hoisted.

        Args:
            name: A node, an input or a weight, by its name in the graph or its full name in the module.

        Returns:
            A few lines of text for each node and weight of that name.

        Raises:
            KeyError: There is no such value; the message names the nearest names.
            TypeError: `name` is no string.

        Example:
            >>> import torch, fusion_compile as fc
            >>> print(fc.explain(torch.nn.ReLU(), (torch.ones(3),), run=False).why("relu"))  # doctest: +ELLIPSIS
            relu: aten.relu.default in graph 0, forward...
              float32[3]; 0 FLOP, 12 bytes read, 12 written, at least ... µs
              read by nothing
              from input
        """
        if not isinstance(name, str):
            raise TypeError(f"why() got a {type(name).__name__}; give the name of a node, an input or a weight.")
        return tell_why(self, name)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report: one HTML file that needs no network and no server.

        Args:
            path: The file. The plots in it need matplotlib; without matplotlib the report says so.

        Raises:
            OSError: `path` cannot be written.

        Example:
            >>> import tempfile, torch, fusion_compile as fc
            >>> explanation = fc.explain(torch.nn.ReLU(), (torch.ones(3),), run=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     explanation.to_html(f"{folder}/report.html")
        """
        from fusion_compile.explain._show.html import write_html  # jinja2 and more, which text does not need

        write_html(self.to_json(), path)


@dataclass(frozen=True)
class Difference(DifferenceFacts):
    """What differs between two explanations, as `Explanation.diff` returns it. It is false if nothing differs.

    Attributes:
        before: Title of the first.
        after: Title of the second.
        operators: Operators of a region whose number of calls or roofline time changed. `regions` holds those whose
            number changed.
        calls: Calls that one side has more often. A call is the same in both if operator, region, type and source line
            are, whatever its name. `nodes_gone` and `nodes_new` hold each with the difference of the counts.
        findings_gone: Findings of the first only. Findings are the same if kind, operator and line are, or else kind,
            operator and file.
        findings_new: Findings of the second only. A second ``.item()`` in a file is new.
        findings_same: Findings of both.
        costs: Sums over all graphs and counts of the run that changed: FLOP, bytes, µs, graph breaks, ….
        kernels_gone: Names of kernels that are gone.
        kernels_new: Names of kernels that are new.
        runtime: Counts and durations in seconds of both runs; None for a side that was not run.
    """

    def __str__(self) -> str:
        return _as_text(lambda console: write_difference(self, console))

    def print(self) -> None:
        """Print to standard output, with colours if it is a terminal.

        Example:
            >>> import torch, fusion_compile as fc
            >>> explanation = fc.explain(torch.nn.ReLU(), (torch.ones(3),), run=False)
            >>> explanation.diff(explanation).print()
            ReLU, 1 graph -> ReLU, 1 graph
            No difference.
        """
        _print(lambda console: write_difference(self, console))

    def _repr_html_(self) -> str:
        return preformatted(str(self))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Return the difference as data for `json.dumps`.

        Args:
            path: Also write the JSON to this file.

        Returns:
            A dictionary of the attributes.

        Raises:
            OSError: `path` cannot be written.

        Example:
            >>> import torch, fusion_compile as fc
            >>> explanation = fc.explain(torch.nn.ReLU(), (torch.ones(3),), run=False)
            >>> explanation.diff(explanation).to_json()["findings_new"]
            []
        """
        data: dict[str, Any] = plain(self)
        if path is not None:
            write_json(data, path)
        return data


def _as_text(write: Callable[[Console], None]) -> str:
    out = StringIO()
    # In a notebook a console would show each line as an output of its own, whatever its file.
    write(Console(file=out, width=WIDTH, no_color=True, force_terminal=False, force_jupyter=False, highlight=False))
    return out.getvalue().rstrip()


def _print(write: Callable[[Console], None]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH, force_jupyter=False)
    with console.capture() as written:
        write(console)
    print(written.get(), end="")  # at once, which a notebook shows as one output
