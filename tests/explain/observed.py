"""Programs that are run while explain listens, and the state of torch that it must leave unchanged."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusion_compile.explain._arguments import Invocation
from fusion_compile.explain._run.runtime import Observation, observe


def observed(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    calls: Sequence[tuple[Any, ...]] = (),
    backend: str | None = "eager",
    fresh: bool = True,
) -> Observation:
    """``observe`` on `args` and then on each of `calls`. `backend`: None calls `fn` as it is."""
    return observe(fn, [Invocation(each, {}) for each in (args, *calls)], backend=backend, fresh=fresh)


def torchs_state(before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything in torch that ``observe`` touches; of the loggers those that are in `before`."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    names = before["loggers"] if before else [n for n in logging.root.manager.loggerDict if n.startswith("torch")]
    loggers = [logging.getLogger(name) for name in ("torch.__trace", *names)]
    return {
        "loggers": {x.name: (x.level, x.disabled, x.propagate, list(x.handlers), list(x.filters)) for x in loggers},
        "dynamo": torch._dynamo.config.get_config_copy(),
        "inductor": inductor_config.get_config_copy(),
        "functorch": functorch_config.get_config_copy(),
        "warnings": list(warnings.filters),
    }
