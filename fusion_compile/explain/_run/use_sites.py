"""Where in the user's code a value is first read, for what torch tells at a wrapper's line."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
import sysconfig
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from fusion_compile.passes._user_frame import is_the_users

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def is_own(path: str) -> bool:
    """Whether a file is the user's own: neither torch's nor this package's, and not part of an installed library."""
    return is_the_users(path) and ("site-packages" not in path) and not path.startswith(_INSTALLED)


class Callee(NamedTuple):
    """The function that a program runs below all wrappers.

    `parameters`: names of its positional parameters, ``self`` included if it has it. `owner`: name of the class whose
    ``self`` it takes, or "". `file`: "" if it is torch's.
    """

    parameters: tuple[str, ...]
    owner: str
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.file else ""


def callee_of(fn: Any) -> Callee | None:
    """Return the function that a call of `fn` runs below its wrappers; None if it is not written in Python."""
    called = fn.forward if isinstance(fn, nn.Module) else fn
    called = getattr(called, "func", called)  # of functools.partial
    owner = getattr(called, "__self__", None)
    plain = inspect.unwrap(getattr(called, "__func__", called))
    code = getattr(plain, "__code__", None)
    if code is None:
        return None
    names = code.co_varnames[: code.co_argcount]
    file = code.co_filename if is_the_users(code.co_filename) else ""
    return Callee(names, type(owner).__qualname__ if owner is not None else "", file, code.co_firstlineno)


def first_read(file: str, line: int, name: str) -> str:
    """Return ``file:line`` where the function that begins at `line` first reads `name`, or else its first part; "" if
    its source is not at hand or does not read it."""
    for function in _functions(file).get(line, ()):
        for wanted in (name, *_root(name)):
            lines = [node.lineno for node in _reads(function) if _text(node) == wanted]
            if lines:
                return f"{file}:{min(lines)}"
    return ""


def read_near(where: str, name: str) -> tuple[str, str]:
    """Return the name and the first line of a value in the function around the line ``file:line``.

    torch names it by the wrapper of a method, ``args[0].groups[0]['lr']``, and at the line that reads ``self.groups``.
    """
    file, _, line = where.rpartition(":")
    around = [f for fs in _functions(file).values() for f in fs if line.isdigit() and _holds(f, int(line))]
    if not around:
        return name, where
    function = max(around, key=lambda f: f.lineno)
    first = function.args.args[0].arg if function.args.args else ""
    named = re.sub(r"^\w+\[0\](?=\.)", first, name) if first == "self" else name
    if _last(name) in linecache.getline(file, int(line)):
        return named, where
    lines = [node.lineno for node in _reads(function) if _last(_text(node)) == _last(name)]
    return named, f"{file}:{min(lines)}" if lines else where


def _holds(function: _Function, line: int) -> bool:
    return function.lineno <= line <= (function.end_lineno or function.lineno)


def starred(file: str, line: int, name: str) -> bool:
    """Whether `name` is an element of ``*args`` or ``**kwargs`` of the function that begins at `line`."""
    root = re.match(r"\w+", name)
    return root is not None and any(
        root[0] in {star.arg for star in (f.args.vararg, f.args.kwarg) if star is not None}
        for f in _functions(file).get(line, ())
    )


def as_the_callee_names_it(name: str, callee: Callee, types: Mapping[str, str]) -> str:
    """Return ``args[1]`` or ``kwargs['x']`` of a wrapper under the name of the callee's parameter; "" if it has none.

    `types`: of the wrapper's values by name. A wrapper of a plain function is given ``self`` first.
    """
    found = re.match(r"\w+\[(?:(?P<at>\d+)|'(?P<key>\w+)')\](?P<rest>.*)", name)
    if found is None:
        return ""
    if found["key"]:
        return found["key"] + found["rest"]
    parameters = callee.parameters
    star = name.partition("[")[0]
    if callee.owner and not types.get(f"{star}[0]", "").endswith(callee.owner.rpartition(".")[2]):
        parameters = parameters[1:]
    at = int(found["at"])
    return parameters[at] + found["rest"] if at < len(parameters) else ""


def method_call(file: str, line: int, method: str) -> tuple[str, str]:
    """Return the object and the ``file:line`` of the first ``object.method(…)`` in the function that begins at `line`;
    both are "" if there is none."""
    for function in _functions(file).get(line, ()):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
                return _text(node.func.value), f"{file}:{node.lineno}"
    return "", ""


def counts_itself(where: str, name: str) -> bool:
    """Whether the line ``file:line`` only counts `name` on, as ``self.calls += 1`` does."""
    file, _, line = where.rpartition(":")
    counted = [n.target for n in _nodes(file) if isinstance(n, ast.AugAssign) and str(n.lineno) == line]
    return any(_last(_text(target)) == _last(name) for target in counted)


def is_read(where: str, name: str) -> bool:
    """Whether the file of ``file:line`` reads a value of the last part of `name`, other than by counting it on."""
    loads = (n for n in _nodes(where.rpartition(":")[0]) if isinstance(getattr(n, "ctx", None), ast.Load))
    return any(_last(_text(node)) == _last(name) for node in loads)


def makes_without_device(where: str, name: str) -> bool:
    """Whether the line ``file:line`` calls ``torch.<name>`` without ``device=``, or with the CPU."""
    file, _, line = where.rpartition(":")
    for node in _nodes(file):
        if not isinstance(node, ast.Call) or not line.isdigit():
            continue
        if node.lineno <= int(line) <= (node.end_lineno or node.lineno) and _text(node.func) == f"torch.{name}":
            given = [_text(keyword.value) for keyword in node.keywords if keyword.arg == "device"]
            if not given or given[0] in ("'cpu'", "torch.device('cpu')"):
                return True
    return False


def _last(name: str) -> str:
    """``"calls"`` of ``self.calls`` and of ``self.stats['calls']``."""
    return re.split(r"[.\[]", name)[-1].strip("]'\"")


def _root(name: str) -> tuple[str, ...]:
    root = re.match(r"\w+", name)
    return (root[0],) if root is not None and root[0] != "self" else ()


def _reads(function: ast.AST) -> Iterator[Any]:
    body = function.body if isinstance(function, ast.Lambda) else None
    for part in [body] if body is not None else getattr(function, "body", []):
        for node in ast.walk(part):
            if isinstance(getattr(node, "ctx", None), ast.Load):
                yield node


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


@functools.lru_cache(maxsize=64)
def _functions(file: str) -> Mapping[int, tuple[_Function, ...]]:
    """The functions of a file by their first line, decorators included."""
    found: dict[int, tuple[_Function, ...]] = {}
    for node in _nodes(file):
        if isinstance(node, _Function):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            found[first] = (*found.get(first, ()), node)
    return found


@functools.lru_cache(maxsize=64)
def _nodes(file: str) -> tuple[ast.AST, ...]:
    try:
        return tuple(ast.walk(ast.parse("".join(linecache.getlines(file)))))
    except (SyntaxError, ValueError):
        return ()
