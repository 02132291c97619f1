"""The description of the process that made an explanation."""

from __future__ import annotations

import datetime
import platform

import torch

from fusion_compile.explain._environment import environment


def test_versions_device_and_an_absolute_date_are_named() -> None:
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    made = environment("cuda", "h100: fast")
    assert (made.torch, made.python) == (torch.__version__, platform.python_version())
    assert (made.device, made.roofline) == ("cuda", "h100: fast")
    when = datetime.datetime.fromisoformat(made.date)
    assert before <= when <= datetime.datetime.now(datetime.UTC)
    assert environment("cpu").roofline == ""
