"""Runs cases on several processes that talk over the loopback: one start, many cases.

A case is a function ``(rank, world) -> None`` that raises where something is wrong; ``name:argument`` gives it another
argument. The processes are forked from a server that has imported torch once. A case that hangs fails within a minute,
and the rest is not run.
"""

from __future__ import annotations

import datetime
import importlib
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HANGS_AFTER = 60.0


def failures(module: str, world: int, cases: Sequence[str]) -> str:
    """Run the functions `cases` of `module` on `world` processes. What went wrong, empty if nothing did."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "fusion_compile", "tests.several_processes"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_run, args=(rank, world, folder, module, cases)) for rank in range(world)]
        for process in processes:
            process.start()
        until = time.monotonic() + HANGS_AFTER + 30.0
        while any(process.is_alive() for process in processes) and time.monotonic() < until:
            if any(process.exitcode not in (None, 0) for process in processes):
                time.sleep(1.0)  # the others may say why, too
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        said = [path.read_text() for path in sorted(Path(folder).glob("rank*"))]
    if any(code != 0 for code in codes) or said:
        return "\n".join(said) or f"exit codes {codes}; None is a process that hung"
    return ""


def said_by(act: Callable[[], Any]) -> str:
    """The error that `act` ends in."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _wait_for_the_others(rank: int, world: int, folder: Path) -> None:
    """Whoever leaves first closes connections on which others may still be reading the barrier's last message."""
    Path(folder, f"done{rank}").touch()
    until = time.monotonic() + 10.0
    while len([*folder.glob("done*")]) < world and time.monotonic() < until:
        time.sleep(0.01)


def _run(rank: int, world: int, folder: str, module: str, cases: Sequence[str]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    timeout = datetime.timedelta(seconds=HANGS_AFTER)
    case = "the start"
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timeout
        )
        functions = importlib.import_module(module)
        for case in cases:
            torch.manual_seed(0)
            name, *argument = case.split(":")
            getattr(functions, name)(rank, world, *argument)
        dist.barrier()
        _wait_for_the_others(rank, world, Path(folder))
    except BaseException:
        Path(folder, f"rank{rank}").write_text(f"rank {rank} in {case}:\n{traceback.format_exc()[-4000:]}")
        os._exit(1)
    dist.destroy_process_group()
