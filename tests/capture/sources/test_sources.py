"""A run that reads a clock, a file, an iterator or a generator of random numbers is found out, with the line."""

from __future__ import annotations

import contextvars
import cProfile
import datetime
import itertools
import logging
import os
import random
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from fusion_compile._capture.sources.sources import Source, Sources

X = torch.ones(4, 8)
HERE = Path(__file__)


def decay() -> Iterator[float]:
    factor = 1.0
    while True:
        yield factor
        factor *= 0.5


class Outside:
    """What is alive before a run. Made when this file's tests begin: what was there before may have been put aside."""

    weights: Iterator[float]
    cycle: Iterator[float]
    steps: Iterator[int]
    fresh: Iterator[float]
    running: Iterator[float]
    own: random.Random
    own_numpy: np.random.Generator


@pytest.fixture(autouse=True, scope="module")
def made_before_the_runs() -> None:
    Outside.weights = iter([0.5, 1.0, 2.0] * 100)
    Outside.cycle = itertools.cycle([0.1, 1.0])
    Outside.steps = itertools.count(1)
    Outside.fresh, Outside.running = decay(), decay()
    next(Outside.running)
    Outside.own, Outside.own_numpy = random.Random(1), np.random.default_rng(1)


SCALE: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=1.0)
HERE_ONLY = threading.local()
HERE_ONLY.scale = 1.0
PAIRS = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 8)), batch_size=4, shuffle=True)
GENERATOR = torch.Generator()


def loop_over_outside_iterator() -> Tensor:
    for weight in Outside.weights:
        if weight == 1.0:
            break
    return X * weight


def seeded_for_one_block() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return X * torch.rand(8)


def same_mask_twice() -> Tensor:
    before = torch.get_rng_state()
    first = torch.rand(8)
    torch.set_rng_state(before)
    return X * first * torch.rand(8)


def seeded_inside_a_checkpoint() -> Tensor:
    def block(h: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.dropout(h.tanh(), 0.5, True)

    return torch.utils.checkpoint.checkpoint(block, X.clone().requires_grad_(), use_reentrant=False)


READS: dict[str, tuple[str, Callable[[], Any]]] = {
    "next": ("iterator", lambda: X * next(Outside.weights)),
    "for": ("iterator", loop_over_outside_iterator),
    "islice": ("iterator", lambda: X * sum(itertools.islice(Outside.weights, 2))),
    "cycle": ("iterator", lambda: X * next(Outside.cycle)),
    "count": ("iterator", lambda: X * next(Outside.steps)),
    "fresh generator": ("iterator", lambda: X * next(Outside.fresh)),
    "running generator": ("iterator", lambda: X * next(Outside.running)),
    "DataLoader": ("iterator", lambda: X * next(iter(PAIRS))[0]),
    "random": ("random", lambda: X * random.random()),
    "uniform": ("random", lambda: X * random.uniform(1, 2)),
    "own Random": ("random", lambda: X * Outside.own.gauss(0, 1)),
    "Random without a seed": ("random", lambda: X * random.Random().random()),
    "numpy": ("random", lambda: X * float(np.random.rand())),
    "own numpy": ("random", lambda: X * float(Outside.own_numpy.normal())),
    "numpy without a seed": ("random", lambda: X * float(np.random.default_rng().normal())),
    "urandom": ("random", lambda: X * os.urandom(1)[0]),
    "uuid": ("random", lambda: X * (uuid.uuid4().int % 7)),
    "time": ("clock", lambda: X * time.time()),
    "monotonic": ("clock", lambda: X * time.monotonic_ns()),
    "datetime": ("clock", lambda: X * datetime.datetime.now().year),
    "date": ("clock", lambda: X * datetime.date.today().year),
    "environ.get": ("environment", lambda: X * float(os.environ.get("SCALE", "1"))),
    "getenv": ("environment", lambda: X * float(os.getenv("SCALE", "1"))),
    "ContextVar": ("context", lambda: X * SCALE.get()),
    "threading.local": ("context", lambda: X * HERE_ONLY.scale),
    "open": ("file", lambda: X * len(HERE.read_text())),
    "numpy file": ("file", lambda: X * len(np.fromfile(HERE, dtype=np.uint8))),
    "exists": ("file", lambda: X * os.path.exists(HERE)),
    "manual_seed": ("torch random", lambda: [torch.manual_seed(7), X + torch.randn(8)]),
    "fork_rng": ("torch random", seeded_for_one_block),
    "set_rng_state": ("torch random", same_mask_twice),
    "seeded generator": ("torch random", lambda: X + torch.randn(8, generator=torch.Generator().manual_seed(5))),
    "generator made inside": ("torch random", lambda: X + torch.randn(8, generator=torch.Generator())),
    "seed in a checkpoint": ("torch random", seeded_inside_a_checkpoint),
}


@pytest.fixture(autouse=True)
def generators_kept() -> Iterator[None]:
    before, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    torch.set_rng_state(before)
    random.setstate(python)
    np.random.set_state(numpy)


@pytest.mark.parametrize("name", READS)
def test_a_read_is_found_with_its_kind_and_line(name: str) -> None:
    kind, run = READS[name]
    with Sources() as sources:
        run()
    assert [source.kind for source in sources.found if source.kind == kind], sources.found
    assert {source.kind for source in sources.found} == {kind}
    path, line = sources.found[0].where.rsplit(":", 1)
    first = run.__code__.co_firstlineno
    assert (path, first <= int(line) <= first + 8) == (str(HERE), True)


def checkpointed(reentrant: bool) -> Tensor:
    out = torch.utils.checkpoint.checkpoint(
        lambda h: torch.dropout(h.tanh(), 0.5, True), X.clone().requires_grad_(), use_reentrant=reentrant
    )
    out.sum().backward()
    return out


def warned() -> Tensor:
    logging.getLogger("sources").debug("step")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("a warning looks its line up in a file", stacklevel=1)
    return X


def set_and_read() -> float:
    token = SCALE.set(2.0)
    try:
        return SCALE.get()
    finally:
        SCALE.reset(token)


HARMLESS: dict[str, Callable[[], Any]] = {
    "iterators made inside": lambda: X * next(iter([1.0, 2.0])) * next(p for p in [1.0]) * sum(k for k in range(3)),
    "zip and unpack": lambda: [a * b for (a, b), _ in zip([(1, 2)], [3], strict=True)],
    "seeded Random made inside": lambda: X * random.Random(3).random(),
    "seeded numpy generator made inside": lambda: X * float(np.random.default_rng(0).normal()),
    "dropout": lambda: torch.dropout(X, 0.5, True),
    "checkpoint": lambda: checkpointed(False),
    "reentrant checkpoint": lambda: checkpointed(True),
    "generator made outside": lambda: X + torch.randn(8, generator=GENERATOR),
    "logging and warnings": warned,
    "import": lambda: __import__("colorsys"),
    "context variable set inside": set_and_read,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_the_same_at_each_run_is_no_source(name: str) -> None:
    with Sources() as sources:
        HARMLESS[name]()
    assert sources.found == []


def test_an_instances_thread_local_is_found() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here = threading.local()
            self.here.scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.here.scale

    model = Scaled()
    with Sources() as sources:
        model(X)
    assert [(s.kind, s.what) for s in sources.found] == [("context", "the threading.local here")]


def test_a_sentence_names_the_line_what_was_read_and_the_remedy() -> None:
    assert Source("clock", "time.time()", "loss.py:3").sentence() == (
        "loss.py:3 reads time.time(), which a captured step would read once and keep for ever. "
        "Read the clock before the step and hand the number over in the batch."
    )
    assert Source("torch random", "torch.manual_seed()", "loss.py:3").sentence() == (
        "loss.py:3 moves torch's random state by torch.manual_seed(), which a captured step would do once, while it is "
        "captured. Seed torch once before training; keep what must stay the same in a buffer."
    )


def test_what_is_printed_or_written_is_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "log").open("w") as log, Sources() as sources:
        print("loss")
        log.write("loss")
    assert [output.what for output in sources.outputs] == ["print()", "TextIOWrapper.write()"]
    assert sources.found == []


def test_a_profiler_gets_its_events_and_comes_back() -> None:
    seen = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        seen.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        with Sources():
            checkpointed(False)
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(before)
    assert "checkpointed" in seen


def test_a_c_profiler_goes_on() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        with Sources():
            pass
        checkpointed(False)
    finally:
        profiler.disable()
    assert "checkpointed" in {getattr(entry.code, "co_name", "") for entry in profiler.getstats()}


def test_nothing_is_watched_after_an_error() -> None:
    sources = Sources()
    with pytest.raises(ZeroDivisionError), sources:
        time.time()
        raise ZeroDivisionError
    assert [source.what for source in sources.found] == ["time.time()"]
    time.time()
    HERE.read_text()
    assert len(sources.found) == 1
    assert sys.getprofile() is None


def test_watches_nest() -> None:
    with Sources() as outer, Sources() as inner:
        time.time()
        HERE.read_text()
    assert [s.kind for s in inner.found] == ["clock", "file"]
    assert [s.kind for s in outer.found] == ["clock", "file"]
