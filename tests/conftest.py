"""What every test gets: a shared Inductor cache, two threads, fixed seeds, a fresh Dynamo, and `device`."""

from __future__ import annotations

import gc
import importlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch and numpy are imported: each reads its variable once.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "inductor"))
# Numpy's own threads beside torch's make the float64 twins 10 times slower on two cores: they spin for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from fusion_compile import _tracked

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each capture of a step looks at everything that the collector tracks, and a worker imports all of these sooner or
    # later: 300,000 objects of libraries, in which no test's iterator lies.
    for library in ("diffusers", "transformers", "sklearn.datasets", "matplotlib.figure", "torch._inductor.compile_fx"):
        importlib.import_module(library)
    gc.collect()
    gc.freeze()
    _tracked.walks_frozen = False

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.hookimpl(tryfirst=True)  # before `-m` takes its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `make exhaustive` what a test marked ``covering(*names)`` has beside the cases with these names, and the
    tests of ``slow_tests.txt``."""
    slow = {*(Path(__file__).parent / "slow_tests.txt").read_text().splitlines()}
    for item in items:
        if item.nodeid in slow:
            item.add_marker("exhaustive")
        marker = item.get_closest_marker("covering")
        if marker is not None:
            case = f"-{item.callspec.id}-"  # type: ignore[attr-defined]
            if not any(f"-{name}-" in case for name in marker.args):
                item.add_marker("exhaustive")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo forgets after each test: of one code object it takes eight compilations, whoever asked for them.

    Costs well under a millisecond, and nothing before a test has imported Dynamo. What a fixture of a wider scope has
    compiled is compiled once more, from Inductor's cache.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True, scope="module")
def put_aside() -> Iterator[None]:
    """What outlives a file's tests is put aside too: what torch and pytest keep of each of them.

    Otherwise the collector, and whoever walks over all objects, would look at more with each test: a third of all time.
    """
    yield
    if "PYTEST_XDIST_WORKER" in os.environ:
        gc.collect()
        gc.freeze()


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU where there is one."""
    return torch.device(request.param)
