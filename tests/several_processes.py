"""Runs cases on several processes of this machine that talk over the loopback, with gloo.

The processes are started once, when a test first asks for so many, and are kept until the tests end: they are forked
from a server that has imported torch once. A case that fails says why on every rank; one that hangs fails within a
minute and says where every rank is. After either the processes are ended, and the next case gets others.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HANGS_AFTER = 50.0
"""Seconds without progress: in a collective, or without any processor time on all ranks together."""
_SAYS_WHY = 3.0
"""Seconds in which the other ranks of a failed case may say something, too."""
_PRELOADED = ["torch", "torch.distributed.fsdp", "torch._dynamo", "fusion_compile", "tests.started_once"]


def on_ranks(world: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """What ``function(rank, world, *given)`` returns on each of `world` processes. `function`: of a module.

    Raises AssertionError with every rank's own words if it raises on one, ends one, or hangs.
    """
    team = _teams.get(world) or _Team(world)
    _teams[world] = team
    found = team.ask(function.__module__, function.__name__, given)
    said = "\n".join(
        f"[rank {rank} of {world}] {what}" for rank, (kind, what) in enumerate(found) if kind != "returned"
    )
    if said:
        _teams.pop(world).end()
    assert not said, f"{function.__name__}{str(given or '')[:200]}\n{said}"
    return [what for _, what in found]


def said_by(act: Callable[[], Any]) -> str:
    """The error that `act` ends in."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class _Team:
    """Processes that make up one process group."""

    def __init__(self, world: int) -> None:
        context: Any = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._lines: list[Connection] = []
        self._processes: list[Any] = []
        with _environment():
            for rank in range(world):
                here, there = context.Pipe()
                given = rank, world, self._folder.name, there
                process = context.Process(target=_serve, args=given, daemon=True)
                process.start()
                there.close()
                self._lines.append(here)
                self._processes.append(process)

    def ask(self, module: str, name: str, given: tuple[Any, ...]) -> list[tuple[str, Any]]:
        """What each rank answers: ``("returned", value)``, ``("raised", traceback)``, or how it did not."""
        for line in self._lines:
            with contextlib.suppress(BrokenPipeError):  # it has died, which is seen below
                line.send_bytes(pickle.dumps((module, name, given)))
        found: dict[int, tuple[str, Any]] = {}
        spent, progress, ends = 0.0, time.monotonic(), float("inf")
        while len(found) < len(self._lines) and time.monotonic() < ends:
            ready = wait([line for rank, line in enumerate(self._lines) if rank not in found], timeout=1.0)
            for rank in (rank for rank, line in enumerate(self._lines) if line in ready):
                found[rank] = self._answer(rank)
                if found[rank][0] != "returned":
                    ends = min(ends, time.monotonic() + _SAYS_WHY)
            if (now := sum(_processor_seconds(p.pid) for p in self._processes)) > spent + 0.3:
                spent, progress = now, time.monotonic()
            if time.monotonic() > progress + HANGS_AFTER:
                break
        for rank in range(len(self._lines)):
            if rank not in found:
                found[rank] = "hung", f"has not ended; it is at\n{self._where(rank)}"
        return [found[rank] for rank in range(len(self._lines))]

    def _answer(self, rank: int) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = pickle.loads(self._lines[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5.0)
            return "died", f"died without a word, with exit code {self._processes[rank].exitcode}"
        return answer

    def _where(self, rank: int) -> str:
        """The stacks of all threads of a process."""
        with contextlib.suppress(OSError):
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)
        return Path(self._folder.name, f"stacks{rank}").read_text()[:6000]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


_teams: dict[int, _Team] = {}


@atexit.register
def _end_all() -> None:
    while _teams:
        _teams.popitem()[1].end()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What the server of the processes is started with: one thread each, and the loopback."""
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    former = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _processor_seconds(pid: int) -> float:
    """Those that a process has used; where the system does not tell, those that have passed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0 if Path("/proc/self/stat").exists() else time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------- in the processes


def _serve(rank: int, world: int, folder: str, line: Connection) -> None:
    """Run what is asked until the tests end."""
    with open(Path(folder, f"stacks{rank}"), "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=HANGS_AFTER),
        )
        while True:
            try:
                module, name, given = pickle.loads(line.recv_bytes())
            except (EOFError, ConnectionResetError):
                os._exit(0)
            _forget()
            line.send_bytes(pickle.dumps(_answered(rank, world, module, name, given)))


def _answered(rank: int, world: int, module: str, name: str, given: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return "returned", getattr(importlib.import_module(module), name)(rank, world, *given)
    except BaseException:
        return "raised", traceback.format_exc()[-6000:]


def _forget() -> None:
    """Give up what the last case has made, but for its process groups: a new group of the same ranks would take the
    name of one that was given up, and find the addresses that the old one left under it."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
