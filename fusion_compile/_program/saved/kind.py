"""For what a program was compiled: torch, the machine, and the source that it was captured from."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_SAID = {
    "torch": "torch {}",
    "python": "Python {}",
    "device": "the device {}",
    "instructions": "a CPU for which torch uses {}",
    "cpu": "a CPU with {}",
    "threads": "{} threads",
}


def machine_kind(device: torch.device) -> dict[str, str]:
    """What a compiled program fits: versions, the device, the CPU's instructions and the number of threads.

    Inductor's C++ is compiled for all instructions of the CPU that it lies on (``-march=native``), which are more than
    torch chooses its own kernels by. Another CPU would end the process.
    """
    kind = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpu": " ".join(_instructions()),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        kind["device"] = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    elif device.type != "cpu":
        kind["device"] = device.type
    return kind


def other_kind(saved: Mapping[str, str], now: Mapping[str, str]) -> str:
    """How `saved` differs from `now`, in words; empty where it does not."""
    differing = [key for key in _SAID if saved.get(key) != now.get(key)]

    def said(of: Mapping[str, str], other: Mapping[str, str]) -> str:
        own = dict(of)
        if "cpu" in differing:
            more = set(of.get("cpu", "").split()) - set(other.get("cpu", "").split())
            own["cpu"] = " ".join(sorted(more)) or "nothing more"
        return ", ".join(_SAID[key].format(own.get(key, "?")) for key in differing)

    return f"it was compiled for {said(saved, now)}, and this is {said(now, saved)}" if differing else ""


def _instructions() -> list[str]:
    """The names of what the CPU has, as torch's library tells them; none where this torch does not tell."""
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return sorted(name for name, has in told.items() if has is True)


def sources(objects: Iterable[Any]) -> dict[str, str]:
    """The modules in which `objects` (functions, or things of some class) are written, with a checksum of each file.

    torch's own are left out, because its version stands for them. What was typed into a prompt has no file.
    """
    found: dict[str, str] = {}
    for thing in objects:
        written = inspect.unwrap(thing) if inspect.isroutine(thing) else type(thing)
        name = str(getattr(written, "__module__", ""))
        if name in found or name.split(".")[0] in ("torch", "builtins", "functools"):
            continue
        try:
            file = inspect.getsourcefile(written)
        except (TypeError, OSError):
            continue
        if file is not None and (path := Path(file)).is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def other_source(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of modules that were changed."""
    return sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name))
