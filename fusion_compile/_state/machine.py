"""On what a run computes, as far as it decides the last bits: a checkpoint keeps it, and a resume elsewhere is told."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

_NAMES = {
    "torch": "torch {}",
    "device": "the device {}",
    "threads": "{} threads",
    "instructions": "the CPU's instructions {}",
}


def computing_on(device: torch.device) -> dict[str, str]:
    """What decides the last bits of sums on `device`: torch's version and the device; on a CPU also the number of
    threads and the instructions that torch uses."""
    if device.type != "cpu":
        named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"torch": torch.__version__, "device": named}
    return {
        "torch": torch.__version__,
        "device": "cpu",
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def warn_of_another(saved: Mapping[str, str], device: torch.device) -> None:
    """Warn where a run that was saved on another machine, or with other threads, goes on here: no resume is bitwise
    then. `saved` is empty where a checkpoint says nothing about it."""
    now = computing_on(device)
    differing = [key for key in _NAMES if saved and saved.get(key) != now.get(key)]
    if not differing:
        return

    def said(of: Mapping[str, str]) -> str:
        return ", ".join(_NAMES[key].format(of[key]) for key in differing if key in of)

    warnings.warn(
        f"the checkpoint was saved with {said(saved)}; here it goes on with {said(now)}. The run continues, but its "
        f"last bits will differ from those of a run that was never stopped. For equal bits resume as it was saved "
        f"(torch.set_num_threads and ATEN_CPU_CAPABILITY set threads and instructions).",
        stacklevel=3,
    )
