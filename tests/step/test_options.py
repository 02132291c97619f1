"""Options of a step are validated where they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile._step.options import StepOptions, refuse_regions


def test_defaults_are_those_of_the_door() -> None:
    assert StepOptions() == StepOptions(1, True, None, None, "inductor")
    assert StepOptions(compute_dtype=torch.bfloat16, accumulate=4).accumulate == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 0}, r"accumulate=0 is not a number of micro-batches; give a whole number, at least 1"),
        ({"accumulate": 1.5}, r"accumulate=1\.5 is not a number of micro-batches"),
        ({"capture": "trace"}, r"capture='trace' is not known; give 'read', 'run' or None"),
        ({"capture": "run", "rehearse": False}, r"nothing else guards a step that is captured by running it"),
        ({"compute_dtype": torch.int8}, r"compute_dtype=torch\.int8 is none that autocast computes in"),
        ({"compute_dtype": torch.float32}, r"torch\.float32 is none that autocast computes in"),
        ({"granularity": "block"}, r"granularity='block' is not known; give 'program' or 'region'"),
        ({"granularity": "region", "capture": "read"}, r"granularity='region' with capture='read': a step falls into"),
        ({"granularity": "region", "capture": "run", "rehearse": False}, r"'region' with rehearse=False: a step falls"),
        ({"granularity": "region", "mode": "eager"}, r"granularity='region' with mode='eager': nothing is compiled"),
        ({"keep_fp32": ["0"]}, r"keep_fp32=.* without a compute_dtype has no effect"),
    ],
)
def test_others_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StepOptions(**options)


def test_regions_are_refused_on_a_gpu_and_on_several_ranks() -> None:
    refuse_regions(StepOptions(granularity="region"), torch.device("cpu"))
    refuse_regions(StepOptions(), torch.device("cuda"))
    with pytest.raises(ValueError, match=r"'region' with parameters on cuda: the regions of a step are not recorded"):
        refuse_regions(StepOptions(granularity="region"), torch.device("cuda"))
    with pytest.raises(ValueError, match=r"granularity='region' with mesh=…: what ranks send each other"):
        refuse_regions(StepOptions(granularity="region"), torch.device("cpu"), several_ranks=True)
