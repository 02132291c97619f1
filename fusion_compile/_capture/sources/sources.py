"""What a real run reads from outside of the objects it can reach: clocks, environment, files, iterators, generators.

A captured step would keep what was read during the capture for ever. Found by profile events (calls of C and Python
functions) and by one audit hook of the process, which does nothing unless a run is watched on its thread.
"""

from __future__ import annotations

import dis
import random
import sys
import threading
import types
from typing import Any, NamedTuple

from fusion_compile._capture.python_state.whose_code import is_user_code
from fusion_compile._capture.sources.outside_iterators import OutsideIterators, is_librarys_own
from fusion_compile._capture.sources.read_calls import (
    Reading,
    builtin_reading,
    is_numpy_draw,
    iterates,
    python_reading,
)
from fusion_compile._capture.sources.torch_generators import GeneratorsSeen
from fusion_compile._capture.sources.who_asks import asker, asks_aside, innermost_user, is_torch, line_of

_HELD_RIGHT = ("utils/checkpoint.py", "_dynamo/", "_functorch/", "_inductor/", "fx/")
"""Torch's own code that puts random states back after it moved them."""
_PASSED_THROUGH = (
    "random.py",
    "cuda/random.py",
    "xpu/random.py",
    "mps/",
    "mtia/",
    "_compile.py",
    "_dynamo/eval_frame.py",
)
"""Torch's seeding functions and their decorators."""
_TORCH_FILES = ("serialization.py", "hub.py", "storage.py")
_FILE_EVENTS = {"open", "os.listdir", "os.scandir", "sqlite3.connect", "shelve.open", "dbm.open"}
_NETWORK_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
_PROCESS_EVENTS = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "os.fork", "os.exec"}

_ADVICE = {
    "clock": "Read the clock before the step and hand the number over in the batch.",
    "environment": "Read it once before training, into an attribute.",
    "file": "Read the file before the step and hand its contents over in the batch.",
    "network": "Fetch the data before the step and hand it over in the batch.",
    "process": "Run it before the step and hand its result over in the batch.",
    "iterator": "Take the next item before the step and hand it over in the batch.",
    "random": "Draw random numbers with torch's global generator, or before the step.",
    "torch random": "Seed torch once before training; keep what must stay the same in a buffer.",
    "output": "Write it after the step, from the returned metrics.",
    "context": "Read the variable before the step and hand the value over in the batch.",
}


class Source(NamedTuple):
    """One thing that was read.

    `kind`: ``"clock"``, ``"environment"``, ``"file"``, ``"network"``, ``"process"``, ``"iterator"``, ``"random"``
    (Python's and numpy's), ``"torch random"``, ``"context"``, and ``"output"`` for what is written. `what`: the call or
    object. `where`: the user's ``"file:line"``, or ``""`` where the read was noticed only at the end.
    """

    kind: str
    what: str
    where: str

    def sentence(self) -> str:
        """One sentence for a refusal."""
        who = self.where or "The step"
        if self.kind == "output":
            did = f"calls {self.what}, which a captured step does not repeat"
        elif self.kind == "torch random":
            did = (
                f"moves torch's random state by {self.what}, which a captured step would do once, while it is captured"
            )
        else:
            did = f"reads {self.what}, which a captured step would read once and keep for ever"
        return f"{who} {did}. {_ADVICE[self.kind]}"


_watched: dict[int, Sources] = {}  # by thread
_hook_stands: list[bool] = []  # an audit hook cannot be taken away


class Sources:
    """Watch what the run inside reads from outside; afterwards `found` has a record for each line.

    A read counts if the innermost code outside of Python's own library that asks for it is the user's or a library's,
    and nothing between that code and the run writes for people (`logging`, `warnings`, progress bars) or imports
    modules. `outputs`: lines that print or write, which a captured step does not repeat.

    A Python profiler that was installed keeps getting its events; any profiler is back at the end.

    Cost on a CPU: one walk over all objects at the beginning (70 ms for 320,000 objects), and 1 to 2 µs for each call
    of a function during the run (7 ms for a DiT of 12 blocks that takes 29). Afterwards the audit hook looks into one
    empty dictionary at each audit event, for the rest of the process.

    Not seen: other threads (the backward of a custom function on a GPU's thread among them); functions of C that C code
    calls (``map(time.time, …)``, ``functools.partial(time.time)()``); libraries that read files or clocks without
    Python; what a local `random.Random(5)` draws, which is the same at each run; what `OutsideIterators` does not see.
    """

    def __init__(self) -> None:
        self.found: list[Source] = []
        self.outputs: list[Source] = []
        self._kinds: dict[int, Reading] = {}
        # Codes that may move an iterator on -> whether they may draw from numpy. By id: hashing a code object is slow.
        self._moving: dict[int, bool] = {}
        self._codes: list[types.CodeType] = []
        self._looked: set[tuple[int, int]] = set()
        self._lines: set[tuple[str, str]] = set()
        self._set_inside: set[int] = set()  # context variables; a library sets one and reads it in its layers

    def __enter__(self) -> Sources:
        self._base = sys._getframe(1)
        self._outside = OutsideIterators()
        self._python_state = random.getstate()
        self._generators = GeneratorsSeen()
        self._generators.__enter__()  # type: ignore[no-untyped-call]
        if not _hook_stands:
            _hook_stands.append(True)
            sys.addaudithook(_audit)
        self._thread = threading.get_ident()
        self.around = _watched.get(self._thread)
        _watched[self._thread] = self
        self._previous = sys.getprofile()
        self._forward = self._previous if callable(self._previous) else None
        sys.setprofile(self.see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        if self.around is None:
            del _watched[self._thread]
        else:
            _watched[self._thread] = self.around
        self._generators.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._look_at_the_end()
        self._outside.forget()
        del self._base
        if self._previous is None or callable(self._previous):
            sys.setprofile(self._previous)
        else:
            self._previous.enable()  # a C profiler: what `sys.getprofile` gives back is no function

    def see(self, frame: types.FrameType, event: Any, arg: Any) -> None:
        """The profile function; hand it the events where another profile function is installed on top."""
        if event == "c_call":
            reading = builtin_reading(arg)
            if reading is not None:
                self._called(frame, arg, reading)
        elif event == "call":
            self._entered(frame)
        elif event == "return":
            if id(frame.f_code) in self._moving:
                self._left(frame)
        elif event == "c_return" and arg is next:
            who = asker(frame)
            if who is not None and is_user_code(who.f_code.co_filename):
                self._note_moved(self._outside.moved(), line_of(who))
        if self._forward is not None:
            self._forward(frame, event, arg)

    def _called(self, frame: types.FrameType, function: Any, reading: Reading) -> None:
        name = function.__name__
        owner = function.__self__
        if reading == "output":
            written = name if function is print else f"{type(owner).__name__}.{name}"
            self._note("output", f"{written}()", frame, self.outputs)
        elif reading == "random":
            if not isinstance(owner, random.Random) or id(owner) in self._outside.randoms:
                kind = type(owner).__name__ if isinstance(owner, random.Random) else "os"
                self._note("random", f"{'random' if kind == 'Random' else kind}.{name}()", frame)
        elif reading == "torch random":
            self._note_seeding(f"torch.Generator.{name}()", frame)
        elif reading == "context":
            if name == "set":
                self._set_inside.add(id(owner))
            elif id(owner) not in self._set_inside:
                self._note("context", f"the ContextVar {owner.name}", frame)
        else:
            module = getattr(owner, "__name__", type(owner).__name__)
            self._note(reading, f"{'os' if module == 'posix' else module}.{name}()", frame)

    def _entered(self, frame: types.FrameType) -> None:
        code = frame.f_code
        reading = self._kinds.get(id(code))
        if reading is None:
            self._codes.append(code)
            reading = self._kinds[id(code)] = python_reading(code)
            if reading == "user" and (iterates(code) or is_numpy_draw(code)):
                self._moving[id(code)] = is_numpy_draw(code)
        if id(frame) in self._outside.frames:
            self._note("iterator", f"the generator {code.co_qualname}, made outside of the step", frame.f_back)
        if reading == "user":
            self._look_for_thread_locals(frame)
        elif reading == "torch random":
            self._note_seeding(f"torch.{code.co_name}()", frame)
        elif reading == "environment":
            self._note("environment", f"os.environ[{frame.f_locals.get('key')!r}]", frame)
        elif reading == "iterator":
            self._note_torch("iterator", "a DataLoader", frame)
        elif reading == "random" and frame.f_locals.get("x", 0) is None:
            self._note("random", "random.Random() without a seed", frame.f_back)

    def _left(self, frame: types.FrameType) -> None:
        """A function of the user's that may have moved an iterator or numpy's generators returns."""
        moved, drawn = self._outside.moved(), self._outside.moved_numpy() if self._moving[id(frame.f_code)] else []
        if (moved or drawn) and not asks_aside(frame, self._base):
            path = frame.f_code.co_filename
            self._note_moved(moved, f"{path}:{_line_that_loops(frame.f_code)}")
            for generator in drawn:
                self._keep("random", f"numpy's {type(generator).__name__}", f"{path}:{frame.f_lineno}")

    def _note_moved(self, moved: list[Any], where: str) -> None:
        for iterator in moved:
            if not is_librarys_own(iterator):
                self._keep("iterator", f"a {type(iterator).__name__} made outside of the step", where)

    def _look_at_the_end(self) -> None:
        self._note_moved(self._outside.moved(), "")
        if not any(s.kind == "random" for s in self.found):
            if self._outside.moved_numpy():
                self._keep("random", "numpy's random numbers", "")
            if random.getstate() != self._python_state:
                self._keep("random", "Python's random numbers", "")
        for where in self._generators.made_inside():
            self._keep("torch random", "a torch.Generator made inside the step", where)

    def _look_for_thread_locals(self, frame: types.FrameType) -> None:
        code = frame.f_code
        names = frame.f_locals
        first = names.get(code.co_varnames[0]) if code.co_argcount else None
        if (id(code), id(type(first))) in self._looked:
            return
        self._looked.add((id(code), id(type(first))))
        named = [(n, names.get(n)) for n in code.co_freevars]
        named += [(n, frame.f_globals.get(n)) for n in code.co_names]
        own = getattr(first, "__dict__", None) if not isinstance(first, types.ModuleType) else None
        if type(own) is dict:
            named += [(n, own.get(n)) for n in code.co_names]
        for name, value in named:
            if issubclass(type(value), threading.local):
                line = next(
                    (i.positions.lineno for i in dis.get_instructions(code) if i.argval == name and i.positions), 0
                )
                if not asks_aside(frame, self._base):
                    self._keep("context", f"the threading.local {name}", f"{code.co_filename}:{line or frame.f_lineno}")

    def _note(self, kind: str, what: str, frame: types.FrameType | None, into: list[Source] | None = None) -> None:
        """A read, if the user's or a library's code asked for it and the answer can reach what is computed."""
        who = asker(frame)
        if who is not None and is_user_code(who.f_code.co_filename) and not asks_aside(frame, self._base):
            self._keep(kind, what, line_of(who), into)

    def _note_torch(self, kind: str, what: str, frame: types.FrameType | None) -> None:
        """A read by torch's code for the user's."""
        if not asks_aside(frame, self._base):
            self._keep(kind, what, line_of(innermost_user(frame)))

    def _note_seeding(self, what: str, frame: types.FrameType) -> None:
        who = asker(frame)
        while who is not None and is_torch(who.f_code.co_filename, *_PASSED_THROUGH):
            who = asker(who.f_back)
        if who is None or is_torch(who.f_code.co_filename, *_HELD_RIGHT, "utils/data/"):
            return
        self._keep("torch random", what, line_of(innermost_user(who)))

    def _keep(self, kind: str, what: str, where: str, into: list[Source] | None = None) -> None:
        if (kind, where) not in self._lines:
            self._lines.add((kind, where))
            (self.found if into is None else into).append(Source(kind, what, where))

    def audited(self, event: str, args: tuple[Any, ...], frame: types.FrameType) -> None:
        """An audit event on the watched thread."""
        kind = "file" if event in _FILE_EVENTS else "network" if event in _NETWORK_EVENTS else "process"
        named = repr(args[0])[:80] if args and type(args[0]) in (str, bytes, int) else ""
        what = {"file": f"the file {named}", "network": f"the network ({event})", "process": f"a process ({event})"}[
            kind
        ]
        who = asker(frame)
        if who is not None and is_torch(who.f_code.co_filename, *_TORCH_FILES):
            self._note_torch(kind, what, frame)
        else:
            self._note(kind, what, frame)


def _line_that_names(code: types.CodeType, name: str) -> int:
    lines = (i.positions.lineno for i in dis.get_instructions(code) if i.argval == name and i.positions is not None)
    return next((line for line in lines if line), code.co_firstlineno)


def _line_that_loops(code: types.CodeType) -> int:
    loops = (i for i in dis.get_instructions(code) if i.opname in ("GET_ITER", "FOR_ITER"))
    lines = (i.positions.lineno for i in loops if i.positions is not None)
    return next((line for line in lines if line), code.co_firstlineno)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in _FILE_EVENTS or event in _NETWORK_EVENTS or event in _PROCESS_EVENTS:
        watch = _watched.get(threading.get_ident())
        while watch is not None:
            watch.audited(event, args, sys._getframe(1))
            watch = watch.around
