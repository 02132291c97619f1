"""Where and when an explanation was made."""

from __future__ import annotations

import datetime
import platform

import torch

from fusion_compile.explain._facts import Environment


def environment(device: str, roofline: str = "") -> Environment:
    """`device`: of the program; `roofline`: of whose peaks the times are made."""
    return Environment(
        torch=torch.__version__,
        python=platform.python_version(),
        device=device,
        roofline=roofline,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
