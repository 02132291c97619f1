"""``fusion-compile``: explain a program, compare two explanations, and use either as a gate in CI."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from torch import fx

from fusion_compile._factory import FactoryError, call_factory
from fusion_compile._gpu_program._compat import why_not
from fusion_compile._gpu_program.command import TARGETS
from fusion_compile._sampler.without_weights.command import add_explain_sampler
from fusion_compile.explain import Explanation, explain
from fusion_compile.explain._graph.roofline import ROOFLINES
from fusion_compile.explain._run.runtime import happened
from fusion_compile.passes import KINDS


class UsageError(Exception):
    """A request that cannot be served, in one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after ``fusion-compile``; by default those of the process.

    Returns:
        The exit status: 0; or 1 if a kind named by ``--fail-on`` was found or a diff has new findings; or 2 if the
        request cannot be served, after one sentence on standard error.

    Example:
        >>> from fusion_compile.cli import main
        >>> main(["diff", "no_such_file.json", "after.json"])  # says so on standard error
        2
    """
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        status: int = asked.run(asked)
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader closed the pipe (| head); discard what Python would still flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusion-compile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser(
        "explain",
        help="report what was captured of a program, what it costs, what went wrong, and why",
        description="Import MODULE, call its FACTORY without arguments, and explain the object that it returns: a "
        "training step, a sampler, an ExportedProgram or a GraphModule. For any other callable, and to watch a step or "
        "a sampler run, FACTORY returns the inputs of a call too: (callable, args) or (callable, args, kwargs), or "
        "(callable, args, kwargs, calls) with further calls, and functions to call between them.",
    )
    one.add_argument("factory", metavar="MODULE:FACTORY")
    one.add_argument("--html", metavar="FILE", help="write the report as one HTML file")
    one.add_argument("--json", metavar="FILE", help="write the explanation as JSON, for diff and for scripts")
    one.add_argument(
        "--fail-on", metavar="KINDS", default="", help="exit with status 1 if one of these kinds was found: a,b,c"
    )
    one.add_argument(
        "--device", metavar="NAME", help=f"device whose peak rates the times assume: {', '.join(ROOFLINES)}"
    )
    one.add_argument(
        "--steps",
        metavar="N",
        type=int,
        default=2,
        help="number of calls to watch, if there are inputs and FACTORY returned no further calls (2)",
    )
    one.add_argument(
        "--target",
        metavar="NAME",
        help=f"show the kernels and launches of a GPU that need not be here, too: {', '.join(TARGETS)}; needs Triton",
    )
    one.set_defaults(run=_explain)

    two = commands.add_parser("diff", help="compare two explanations; exit with status 1 if there are new findings")
    two.add_argument("before", metavar="BEFORE.json")
    two.add_argument("after", metavar="AFTER.json")
    two.add_argument("--html", metavar="FILE", help="write the comparison as a report")
    two.set_defaults(run=_diff)

    add_explain_sampler(commands)
    return parser


def _explain(asked: argparse.Namespace) -> int:
    if asked.steps < 0:
        raise UsageError(f"--steps {asked.steps} is not a number of calls; give 0 or more.")
    if unknown := sorted(_kinds(asked.fail_on) - set(KINDS)):
        raise UsageError(f"--fail-on names {', '.join(unknown)}, which no finding is; use {', '.join(KINDS)}.")
    if asked.device is not None and asked.device.lower() not in ROOFLINES:
        raise UsageError(f"--device {asked.device} has no published peaks here; use one of {', '.join(ROOFLINES)}.")
    if asked.target is not None and asked.target.lower() not in TARGETS:
        raise UsageError(f"--target {asked.target} is no GPU that programs are written for; use {', '.join(TARGETS)}.")
    if asked.target is not None and (reason := why_not()):
        raise UsageError(f"--target {asked.target}: {reason}")
    try:
        obj, args, kwargs, calls = call_factory(asked.factory)
    except FactoryError as error:
        raise UsageError(str(error)) from error
    watched = bool(args or kwargs) and not isinstance(obj, fx.GraphModule)  # which is read and not run
    further = list(calls) or [(args, kwargs)] * (asked.steps - 1) if watched and asked.steps else []
    try:
        explanation = explain(obj, args, kwargs, device=asked.device, run=asked.steps > 0, calls=further)
    except (TypeError, ValueError) as error:
        if not str(error).startswith("explain() got"):
            raise
        raise UsageError(f"{asked.factory}: {error}") from error
    explanation.print()
    if asked.json:
        explanation.to_json(asked.json)
    if asked.html:
        explanation.to_html(asked.html)
    if asked.target is not None:
        _show_target(asked.factory, asked.target.lower())
    return _gate(explanation, asked.fail_on)


def _show_target(factory: str, target: str) -> None:
    """Print a GPU's kernels and launches, from a process of its own: it makes torch believe in a GPU."""
    command = [sys.executable, "-m", "fusion_compile._gpu_program.command", factory, target]
    sys.stdout.flush()
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        last = next((line for line in reversed(ran.stderr.splitlines()) if line.strip()), "it said nothing")
        raise UsageError(f"--target {target}: {last}")
    print(ran.stdout, end="")


def _gate(explanation: Explanation, fail_on: str) -> int:
    """Return 1 and list the findings if a kind that `fail_on` names was found or happened; else return 0."""
    wanted = _kinds(fail_on)
    hits = [f for f in explanation.findings if f.kind in wanted]
    seen = happened(explanation.runtime) if explanation.runtime is not None else frozenset[str]()
    others = sorted((wanted & seen) - {f.kind for f in hits})
    if not hits and not others:
        return 0
    print(f"failed on {', '.join(sorted({f.kind for f in hits} | {*others}))}:", file=sys.stderr)
    for finding in hits:
        print(f"  {finding}", file=sys.stderr)
    for kind in others:
        print(f"  {kind} happened; the findings name its cause.", file=sys.stderr)
    return 1


def _kinds(listed: str) -> set[str]:
    return {kind.strip() for kind in listed.split(",") if kind.strip()}


def _diff(asked: argparse.Namespace) -> int:
    before, after = _read(asked.before), _read(asked.after)
    difference = before.diff(after)
    difference.print()
    if asked.html:
        from fusion_compile.explain._show.html import write_diff_html

        write_diff_html(before.to_json(), after.to_json(), asked.html)
    return 1 if difference.findings_new else 0


def _read(path: str) -> Explanation:
    try:
        return Explanation.from_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
