"""A whole step's program, its kernels run by Triton's interpreter, computes what mode "eager" and fp64 compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from fusion_compile.optim.recipes import RECIPES
from tests.gpu_program.complete_optimizers import FURTHER

pytestmark = [pytest.mark.cuda_codegen, pytest.mark.timeout(3600)]


class Bound(NamedTuple):
    """Of a difference, relative to the largest step of an entry: of interpreter and eager, of interpreter and fp64."""

    eager: float
    exact: float


ROUNDING = Bound(2e-4, 2e-4)
"""Both round in fp32, each in an order of its own: 5e-5 was seen between them, and 1e-4 from fp64. Newton-Schulz's
products are fp32 here. In bf16, the default, both are 2e-2 from fp64, and 3e-2 from each other."""
USUAL_EPS = Bound(2e-4, 1e-3)
"""With Adam's usual eps of 1e-8 an entry whose gradient is small moves by another part of the step for a rounding of
its gradient: 6e-4 was seen. `ROUNDING` is for an eps of 1e-3."""
CODES = Bound(1e-3, 8e-3)
"""A first moment in bf16 or int8: a sum that differs in its last bit is rounded to the next code in a few entries. A
code of bf16 is 2⁻⁸ of its entry, one of int8 is 1/127 = 7.9e-3 of the largest: one code is allowed from fp64, and was
seen. From eager 8e-4 was seen."""
TINY_STEP = Bound(2e-3, 0.1)
"""The first step is a millionth, and the weight that it is added to is rounded to 2⁻²⁴ of itself: 1e-3 of the step was
seen from eager, where single entries round the other way, and 8e-2 from fp64, which rounds nothing."""
LARGE_WEIGHT = Bound(2e-4, 2.5e-3)
"""Lion's step is 1e-4, and the largest weight of the embedding 4.1, where half of fp32's spacing is 2.4e-3 of it."""
DECAY = Bound(2e-4, 6e-3)
"""The first step of SOAP and of full_fusion decays the matrices and does no more, by 1e-5 and 5e-5 of a weight: half of
fp32's spacing at the largest weight, 7.5e-9, is 5.5e-3 of SOAP's step. Their second step has directions."""

BOUNDS = {
    **dict.fromkeys(RECIPES, ROUNDING),
    **dict.fromkeys(FURTHER, USUAL_EPS),
    **dict.fromkeys(("adakaon", "adapnm", "adamuon", "adamw, bf16, int8", "normuon, int8"), CODES),
    **dict.fromkeys(("prodigy", "mechanic of adamw"), TINY_STEP),
    **dict.fromkeys(("soap", "full_fusion"), DECAY),
    "lion, 4bit": LARGE_WEIGHT,
}
TOGETHER = [["adamw", "lion", "sf_adamw", "soap"], ["muon", "normuon", "sf_normuon"], ["full_fusion"], [*FURTHER]]
"""Names that share a process, because to begin one takes seconds."""


SECOND = ["soap", "full_fusion"]
ONE_SPACING = Bound(3.5e-4, 2e-4)
"""Their second step turns into the bases and has a direction. SOAP's is 1e-4, of which fp32's spacing at the largest
weight, 1.5e-8, is 1.6e-4: so much was seen from eager, one entry rounded the other way, and 1.2e-4 from fp64."""


def compared(names: list[str], number: int = 1) -> dict[str, dict[str, list[float]]]:
    """By name and state tensor: interpreter and eager, interpreter and fp64, eager and fp64, and what is off."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu_program.interpreted", "float32", str(number), *names]
    # The folders that pytest has added to the path, too: the repository's, and the examples'.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, dict[str, list[float]]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_every_optimizer_is_run() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted([*RECIPES, *FURTHER])


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_a_step_in_the_interpreter_is_as_exact_as_mode_eager(names: list[str]) -> None:
    for name, tensors in compared(names).items():
        check(name, tensors, BOUNDS[name])


def test_a_second_step_in_the_interpreter_is_as_exact_as_mode_eager() -> None:
    for name, tensors in compared(SECOND, number=2).items():
        check(name, tensors, ONE_SPACING)


def check(name: str, tensors: dict[str, list[float]], bound: Bound) -> None:
    assert any(key.startswith("params/") for key in tensors), name
    for key, (eager, exact, _, _) in tensors.items():
        print(f"{name}: {key}: {eager:.1e} from eager, {exact:.1e} from fp64")
        assert eager < bound.eager and exact < bound.exact, (name, key, eager, exact)
