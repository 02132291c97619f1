"""Where and when an explanation was made."""

from __future__ import annotations

import datetime
import platform

import torch

from fusion_compile.explain._facts import Environment


def environment(device: str, roofline: str = "") -> Environment:
    """Describe this process. `device`: the program's. `roofline`: the device whose peak rates the times assume."""
    return Environment(
        torch=torch.__version__,
        python=platform.python_version(),
        device=device,
        roofline=roofline,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
