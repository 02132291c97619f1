"""The options of a training step that its program depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fusion_compile._program.shared_regions import SharedRegions
from fusion_compile._state.half_precision import check_form
from fusion_compile._state.kept_average import KeptAverage
from fusion_compile._state.routing import check_list
from fusion_compile._step.loss_scale import LossScale
from fusion_compile._step.precision import DTYPES as PRECISIONS
from fusion_compile._step.shapes import MAX_PROGRAMS
from fusion_compile._step.way import CAPTURES, Capture
from fusion_compile.optim.averaged import Average

Granularity = Literal["program", "region"]
GRANULARITIES = ("program", "region")


@dataclass(frozen=True)
class StepOptions:
    """What `compile_training_step` is given under these names, validated."""

    accumulate: int = 1
    skip_nonfinite: bool = True
    compute_dtype: torch.dtype | None = None
    mode: str | None = None
    backend: str = "inductor"
    capture: Capture | None = None
    granularity: Granularity = "program"
    rehearse: bool = True
    keep_fp32: Sequence[str] = ()
    weigh_by: str | None = None
    max_shapes: int = MAX_PROGRAMS
    dynamic: bool = False
    half_precision: str = "master"
    averages: Sequence[KeptAverage] = ()
    keep_gradients: bool = False
    loss_scale: LossScale | bool | None = None
    activation_memory: float | None = None
    publish_every: int = 1

    @property
    def rules(self) -> list[Average]:
        """How each of the averages follows the weights."""
        return [kept.average for kept in self.averages]

    @property
    def fixes_numbers(self) -> bool:
        """Whether each value of a Python number in a batch needs a program, because Dynamo would fix it."""
        return self.mode != "eager" and (self.capture == "read" or not self.rehearse)

    def compiler(self, mode: str) -> str:
        """What a progress line calls the compiler. `mode` counts for Inductor only."""
        return mode if self.backend == "inductor" else self.backend

    def shared_regions(self, mode: str) -> SharedRegions | None:
        """What the programs of a step that is compiled by regions share; None for one that is compiled as one."""
        return SharedRegions(mode, self.backend) if self.granularity == "region" else None

    def __post_init__(self) -> None:
        check_form(self.half_precision)
        if self.capture not in CAPTURES:
            raise ValueError(f"capture={self.capture!r} is not known; give 'read', 'run' or None.")
        if not isinstance(self.rehearse, bool):
            raise TypeError(f"rehearse={self.rehearse!r} is a {type(self.rehearse).__name__}; give True or False.")
        self._check_granularity()
        if self.capture == "run" and not self.rehearse:
            raise ValueError(
                "capture='run' with rehearse=False: the rehearsal shows what the loss leaves behind and reads, and "
                "nothing else guards a step that is captured by running it. Leave out one of the two."
            )
        if not isinstance(self.accumulate, int) or isinstance(self.accumulate, bool) or self.accumulate < 1:
            raise ValueError(
                f"accumulate={self.accumulate!r} is not a number of micro-batches; give a whole number, at least 1."
            )
        if not isinstance(self.max_shapes, int) or isinstance(self.max_shapes, bool) or self.max_shapes < 1:
            raise ValueError(f"max_shapes={self.max_shapes!r} is not a number of batch shapes; give at least 1.")
        every = self.publish_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"publish_every={every!r} is not a number of steps; give a whole number, at least 1.")
        if not isinstance(self.dynamic, bool):
            raise TypeError(f"dynamic={self.dynamic!r} is a {type(self.dynamic).__name__}; give True or False.")
        if not isinstance(self.keep_gradients, bool):
            raise TypeError(
                f"keep_gradients={self.keep_gradients!r} is a {type(self.keep_gradients).__name__}; give True or False."
            )
        self._check_activation_memory()
        if self.loss_scale is not None and not isinstance(self.loss_scale, (bool, LossScale)):
            raise TypeError(
                f"loss_scale={self.loss_scale!r} is a {type(self.loss_scale).__name__}; give a LossScale, or False."
            )
        if self.weigh_by is not None and not isinstance(self.weigh_by, str):
            raise TypeError(f"weigh_by={self.weigh_by!r} is not a name; give that of a metric that the loss returns.")
        if not isinstance(self.skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite={self.skip_nonfinite!r} is not a switch; give True or False.")
        if not isinstance(self.backend, str):
            raise TypeError(f"backend={self.backend!r} is not a name; give a torch.compile backend's, 'inductor'.")
        if self.compute_dtype is not None and not isinstance(self.compute_dtype, torch.dtype):
            raise TypeError(f"compute_dtype={self.compute_dtype!r} is not a dtype; give torch.bfloat16, for example.")
        if self.compute_dtype is not None and self.compute_dtype not in PRECISIONS:
            raise ValueError(
                f"compute_dtype={self.compute_dtype} is none that autocast computes in; give torch.bfloat16 or "
                f"torch.float16, or leave it out to compute in the dtype of the model's parameters."
            )
        check_list("keep_fp32", self.keep_fp32)
        if self.keep_fp32 and self.compute_dtype is None:
            raise ValueError(
                f"keep_fp32={list(self.keep_fp32)} without a compute_dtype has no effect; give "
                f"compute_dtype=torch.bfloat16, or leave it out."
            )

    def _check_activation_memory(self) -> None:
        share = self.activation_memory
        if share is None:
            return
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"activation_memory={share!r} is no share of activations; give a number above 0, up to 1.")
        if self.mode == "eager" or self.backend != "inductor" or self.granularity != "program" or self.dynamic:
            raise ValueError(
                f"activation_memory={share} chooses in the one graph that Inductor compiles for one shape; leave it "
                f"out, or leave out mode='eager', another backend, granularity='region' and dynamic=True."
            )

    def _check_granularity(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r} is not known; give 'program' or 'region'.")
        if self.granularity == "program":
            return
        if self.capture == "read" or not self.rehearse:
            given = "capture='read'" if self.capture == "read" else "rehearse=False"
            raise ValueError(
                f"granularity='region' with {given}: a step falls into regions where it was captured by running it, "
                f"and a run is rehearsed. Leave out one of the two."
            )
        if self.mode == "eager":
            raise ValueError(
                "granularity='region' with mode='eager': nothing is compiled, as one or in regions. Leave out one."
            )


def refuse_regions(options: StepOptions, device: torch.device, *, several_ranks: bool = False) -> None:
    """Raise ValueError for a step that is to be compiled by regions where that is not known to be right."""
    if options.granularity == "program":
        return
    if device.type != "cpu":
        raise ValueError(
            f"granularity='region' with parameters on {device}: the regions of a step are not recorded as one CUDA "
            f"graph yet, so each would be launched by itself. Leave it out, which compiles the step as one."
        )
    if several_ranks:
        raise ValueError(
            "granularity='region' with mesh=…: what ranks send each other has not been tried between regions. Leave "
            "it out, which compiles the step as one."
        )
