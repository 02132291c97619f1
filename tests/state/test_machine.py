"""A resume on another machine, or with other threads, is told; the same machine is not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from fusion_compile._state import checksums
from fusion_compile._state.machine import computing_on, warn_of_another
from tests.small_models import batches, bits, compiled, mlp

CPU = torch.device("cpu")


def test_a_cpu_is_its_threads_and_its_instructions() -> None:
    assert computing_on(CPU) == {
        "torch": torch.__version__,
        "device": "cpu",
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    assert computing_on(torch.device("meta")) == {"torch": torch.__version__, "device": "meta"}


def test_only_what_differs_is_told() -> None:
    here = computing_on(CPU)
    warn_of_another(here, CPU)
    warn_of_another({}, CPU)  # as a checkpoint of an earlier version
    with pytest.warns(
        UserWarning, match=r"saved with 64 threads; here it goes on with \d+ threads\. The run continues"
    ):
        warn_of_another({**here, "threads": "64"}, CPU)
    with pytest.warns(UserWarning, match=r"saved with torch 2\.0, the CPU's instructions DEFAULT; here"):
        warn_of_another({**here, "torch": "2.0", "instructions": "DEFAULT"}, CPU)
    with pytest.warns(UserWarning, match="saved with the device NVIDIA H100; here it goes on with the device cpu, "):
        warn_of_another({"torch": torch.__version__, "device": "NVIDIA H100"}, CPU)


def test_a_step_that_is_loaded_with_another_number_of_threads_says_so_and_goes_on(tmp_path: Path) -> None:
    step = compiled(mlp(), mode="eager")
    for batch in batches(2):
        step(*batch)
    step.save(tmp_path)
    other = compiled(mlp(), mode="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load(tmp_path)
    index = json.loads((tmp_path / "checkpoint.json").read_text())
    assert index["computed_on"] == computing_on(CPU)
    index["computed_on"]["threads"] = "64"
    index["checksum"] = checksums.of_index({k: v for k, v in index.items() if k != "checksum"})
    (tmp_path / "checkpoint.json").write_text(json.dumps(index))
    third = compiled(mlp(), mode="eager")
    with pytest.warns(UserWarning, match="64 threads") as told:
        third.load(tmp_path)
    assert told[0].filename == __file__, "at the user's own line"
    assert bits(third) == bits(step)
