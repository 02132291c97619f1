"""Private API of Inductor: how it compiles the C++ kernels of a program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fusion_compile._program.kernel_sources.joined import File, Kernel, joined
from fusion_compile._say_once import SayOnce

_MARKS = ("static PyObject* {entry_func}_py", "static PyMethodDef", "static struct PyModuleDef")
"""Where torch's Python bindings of a kernel fall apart: what all share, a function's own, the list of functions, the
module."""

_say = SayOnce()


@contextlib.contextmanager
def kernels_compiled_together() -> Iterator[None]:
    """Inside, Inductor compiles the C++ kernels of a program in a few files, and not each in its own.

    Each file costs the compiler what it includes, several times what a kernel costs. The kernels are the same. Where
    torch has moved what this replaces, nothing happens.
    """
    from torch._inductor import async_compile, codecache

    replaced: Any = async_compile.AsyncCompile
    cache: Any = getattr(codecache, "CppPythonBindingsCodeCache", None)
    template = str(getattr(cache, "suffix_template", ""))
    needed = ((replaced, "cpp_pybinding"), (replaced, "wait"), (replaced, "submit"), (cache, "load_async"))
    if not all(hasattr(owner, name) for owner, name in needed) or not _falls_apart(template):
        yield
        return
    alone, wait = replaced.cpp_pybinding, replaced.wait

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        async_compile.kernel_code_log.info("CPP+Bindings Kernel:\n%s", source_code)
        return Waiting(Kernel(tuple(argtypes), source_code))

    def wait_for_all(self: Any, scope: dict[str, Any]) -> None:
        waiting = {name: value for name, value in scope.items() if type(value) is Waiting}
        kernels = [value.kernel for value in waiting.values()]
        compiled = _compiled(self, cache, kernels)
        for (name, value), function in zip(waiting.items(), compiled, strict=True):
            scope[name] = function or alone(self, list(value.kernel.types), value.kernel.source)
        wait(self, scope)

    replaced.cpp_pybinding, replaced.wait = cpp_pybinding, wait_for_all
    try:
        yield
    finally:
        replaced.cpp_pybinding, replaced.wait = alone, wait


class Waiting:
    """A kernel of a program that is being loaded, until all of the program's are known."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel


def _falls_apart(template: str) -> bool:
    places = [template.find(mark) for mark in _MARKS]
    return all(template.count(mark) == 1 for mark in _MARKS) and places == sorted(places)


def _compiled(compiler: Any, cache: Any, kernels: list[Kernel]) -> list[Callable[..., Any] | None]:
    """The compiled functions in the order of `kernels`; None for one that is to be compiled by itself."""
    from torch._inductor.async_compile import get_compile_threads
    from torch._inductor.exc import CppCompileError

    functions: list[Callable[..., Any] | None] = [None] * len(kernels)
    files = joined(kernels)
    submit = compiler.submit if get_compile_threads() > 1 else None
    futures = [cache.load_async(file.source() + _bindings(cache, file), "cpu", submit_fn=submit) for file in files]
    for file, future in zip(files, futures, strict=True):
        try:
            module = future()
        except CppCompileError as error:
            _say(
                "together",
                f"the C++ compiler did not compile {len(file.kernels)} kernels in one file, so they are compiled one "
                f"by one, which takes longer ({str(error).splitlines()[0]}).",
            )
            continue
        for at, name in zip(file.at, file.names(), strict=True):
            functions[at] = getattr(module, name)
    return functions


def _bindings(cache: Any, file: File) -> str:
    """C++ by which Python calls the kernels of `file`: torch's own, for several functions in a module."""
    template = str(cache.suffix_template)
    function, listed, module = (template.index(mark) for mark in _MARKS)
    shared = template[:function].format(entry_func="kernel", extra_parse_arg="")
    calls, entries = [], []
    for kernel, name in zip(file.kernels, file.names(), strict=True):
        given = ", ".join(f"parse_arg<{of.replace('const ', '')}>(args, {n})" for n, of in enumerate(kernel.types))
        call = str(cache.call_entry_function).replace("kernel(", f"{name}(").format(given)
        calls.append(template[function:listed].format(entry_func=name, arg_len=len(kernel.types), call_entry_func=call))
        entries.append(f'{{"{name}", {name}_py, METH_VARARGS, ""}},')
    methods = "\n".join(["static PyMethodDef py_methods[] = {", *entries, "{NULL, NULL, 0, NULL}};"])
    return "\n".join([shared, *calls, methods, template[module:].format(entry_func="kernel")])
