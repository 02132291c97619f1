"""``fusion-compile``: explain a program from the command line, compare two explanations, guard a CI with either."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from fusion_compile._sampler.without_weights.command import add_explain_sampler
from fusion_compile.explain import Explanation, explain
from fusion_compile.explain._graph.roofline import ROOFLINES
from fusion_compile.explain._run.runtime import happened
from fusion_compile.passes import KINDS


class UsageError(Exception):
    """What was asked cannot be done as asked; one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when what ``--fail-on`` names was found or a diff has new findings, or 2 for a request that
    cannot be served, after one sentence on standard error."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        status: int = asked.run(asked)
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader had enough (| head); what Python would still flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusion-compile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser(
        "explain",
        help="what was captured, what it costs, what went wrong, and why",
        description="Import MODULE, call its FACTORY without arguments and explain what it returns: a training step, a "
        "sampler, an ExportedProgram, a GraphModule, or a tuple of one of these or of any callable and the arguments "
        "of a call, (callable, args) or (callable, args, kwargs).",
    )
    one.add_argument("factory", metavar="MODULE:FACTORY")
    one.add_argument("--html", metavar="FILE", help="write the report")
    one.add_argument("--json", metavar="FILE", help="write the explanation, for diff and for scripts")
    one.add_argument(
        "--fail-on", metavar="KINDS", default="", help="exit with 1 if one of these kinds was found: a,b,c"
    )
    one.add_argument("--device", metavar="NAME", help=f"whose peaks the times assume: {', '.join(ROOFLINES)}")
    one.add_argument("--steps", metavar="N", type=int, default=2, help="calls to watch, where there are arguments (2)")
    one.set_defaults(run=_explain)

    two = commands.add_parser("diff", help="what differs between two explanations, and whether there are new findings")
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
        raise UsageError(f"--fail-on names {', '.join(unknown)}, which no finding is; use of {', '.join(KINDS)}.")
    if asked.device is not None and asked.device.lower() not in ROOFLINES:
        raise UsageError(f"--device {asked.device} has no published peaks here; use one of {', '.join(ROOFLINES)}.")
    obj, args, kwargs = _made(asked.factory)
    options: dict[str, Any] = {"device": asked.device}
    if args or kwargs:
        options |= {"run": asked.steps > 0, "calls": [args] * (asked.steps - 1)}
    try:
        explanation = explain(obj, *args, **options, **kwargs)
    except TypeError as error:
        if not str(error).startswith("explain() got"):
            raise
        raise UsageError(f"{asked.factory}: {error}") from error
    explanation.print()
    if asked.json:
        explanation.to_json(asked.json)
    if asked.html:
        explanation.to_html(asked.html)
    return _gate(explanation, asked.fail_on)


def _gate(explanation: Explanation, fail_on: str) -> int:
    """1, with the findings listed, if one of the kinds that `fail_on` names was found or happened."""
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
        print(f"  {kind} happened; the findings above name its cause.", file=sys.stderr)
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


def _made(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What the factory returned, and the arguments to call it with."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UsageError(f"{name!r} is not MODULE:FACTORY, as in train:make_step.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"there is no module {module!r} here or on the path.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module} has no {attribute!r}; give a function that takes no arguments.")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}; give a function that takes no arguments.")
    made = found()
    if not isinstance(made, tuple):
        return made, (), {}
    obj, args, kwargs = made if len(made) == 3 else (*made, {}) if len(made) == 2 else (made, None, None)
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise UsageError(f"{name}() returned a tuple that is not (callable, args) or (callable, args, kwargs).")
    return obj, args, kwargs
