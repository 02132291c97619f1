"""Functions on several gloo processes of this machine: a hang is a failure within a minute."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 60
"""After which a collective counts as hanging: all processes then fail."""
WHOLE = 300
"""After which processes are ended that have neither returned nor failed."""


def on_ranks(world: int, function: Callable[..., Any], *given: Any, seconds: float = WHOLE) -> list[Any]:
    """What ``function(rank, world, *given)`` returns on each of `world` processes. `function`: of a module.

    Raises AssertionError with the processes' own words if one fails or hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with _environment():
            processes = [context.Process(target=_run, args=(r, world, folder, function, given)) for r in range(world)]
            for process in processes:
                process.start()
        ends = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        found = [_read(Path(folder) / str(rank)) for rank in range(world)]
        said = "\n".join(f"[rank {r}] {what}" for r, (kind, what) in enumerate(found) if kind != "returned")
        assert not hung and not said, f"hung: {hung}\n{said}"
        return [what for _, what in found]


class _environment:
    """One thread a process, and the loopback."""

    def __enter__(self) -> None:
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._former = {name: os.environ.get(name) for name in own}
        os.environ.update(own)

    def __exit__(self, *raised: object) -> None:
        for name, value in self._former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read(path: Path) -> tuple[str, Any]:
    found: tuple[str, Any] = pickle.loads(path.read_bytes()) if path.exists() else ("died", "without a word")
    return found


def _run(rank: int, world: int, folder: str, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rendezvous, limit = f"file://{folder}/rendezvous", timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
    try:
        result: tuple[str, Any] = "returned", function(rank, world, *given)
    except BaseException:
        result = "raised", traceback.format_exc()[-6000:]
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    if result[0] == "raised":
        os._exit(1)  # the others must not wait for it
    dist.barrier()
    dist.destroy_process_group()
