"""`optimize_sampler`: a diffusion model whose time conditioning is a table.

The model is exported and split by when its values become known. A table is computed once per schedule, a prologue runs
once per request for all steps, and a body takes the latent and reads one row. ``docs/sampler.md`` explains all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._notebook import preformatted
from fusion_compile._program.lower import resolve_mode
from fusion_compile._program.saved.folder import load_program, refuse_uncompiled, save_program
from fusion_compile._sampler.call_arguments import Arguments, as_args_and_kwargs
from fusion_compile._sampler.conditioning import Batched as Batched
from fusion_compile._sampler.conditioning import Conditioning as Conditioning
from fusion_compile._sampler.conditioning import Exact as Exact
from fusion_compile._sampler.conditioning import Rank as Rank
from fusion_compile._sampler.module import SamplerModule
from fusion_compile._sampler.options import SamplerOptions
from fusion_compile._sampler.report import ProgramReport as ProgramReport
from fusion_compile._sampler.report import RankReport as RankReport
from fusion_compile._sampler.report import SamplerReport as SamplerReport
from fusion_compile._sampler.schedule import as_schedule, count_steps
from fusion_compile._sampler.stand_in import in_turn
from fusion_compile._sampler.table.trajectory_watch import Verify as Verify
from fusion_compile._sampler.weights.unservable import refuse_unservable
from fusion_compile.explain import Explanation
from fusion_compile.explain._subjects.sampler import explain_sampler

_RENAMED = {"free_hoisted_weights": "release_weights(to='drop')", "reports": "report.programs"}


class Sampler(SamplerModule):
    """A drop-in for the model it was made from; made by `optimize_sampler` and called as the model is.

    A sampler is an `nn.Module` with the model's `forward` signature, parameters and state dict. An attribute that it
    does not have itself is the model's. Give ``sampler.model`` to code that asks for the model's class
    (``isinstance(model, ModelMixin)``).

    Attributes:
        model: The model.
        timesteps: The schedule that was given last, ``[n]`` on the CPU, or the preset of `sample`.
        report: What was hoisted and declined, as a `SamplerReport`; print it to read it.

    Example:
        >>> import torch, fusion_compile as fc
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x, t):
        ...         return x * t[:, None]
        >>> sampler = fc.optimize_sampler(Model().eval(), 4, mode="eager")
        >>> sampler(torch.ones(2, 3), torch.full((2,), 0.5))
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    def _repr_html_(self) -> str:
        return preformatted(str(self.report))

    def explain(self, *, device: str | None = None) -> Explanation:
        """Explain the graph by binding time, and for each value why it was or was not hoisted.

        Args:
            device: Whose peak rates the estimated times assume, as `fusion_compile.explain` takes it; None is the
                device of the model.

        Returns:
            An `Explanation`. Print it, or call `why(name)` for one value or weight.

        Raises:
            ValueError: If `device` has no published peaks here.

        Example:
            >>> import torch, fusion_compile as fc
            >>> class Model(torch.nn.Module):
            ...     def forward(self, x, t):
            ...         return x * t[:, None]
            >>> inputs = (torch.ones(2, 3), torch.full((2,), 0.5))
            >>> sampler = fc.optimize_sampler(Model().eval(), 4, mode="eager", example_inputs=inputs)
            >>> sampler.explain().findings
            ()
        """
        return explain_sampler(self, device)

    @in_turn
    def save_program(self, path: str | PathLike[str]) -> None:
        """Write what was compiled, so that another process makes its first call sooner.

        ``optimize_sampler(…, program=path)`` reads it, with the same torch and Python, on the same kind of machine and
        with as many threads; else it says so and compiles. The model is still exported and its table computed. The
        file is written beside an older one and renamed. It holds code: read only what you trust as you trust code.

        Args:
            path: The folder; it is made where it is missing.

        Raises:
            ValueError: Nothing is compiled yet, or Inductor compiles nothing, or torch's caches are off.
        """
        device = device_of(self.model)
        refuse_uncompiled(resolve_mode(self._options.mode, device), self._options.backend)
        if not len(self._programs):
            raise ValueError(
                "the sampler has no program to save before its first call; call or prepare() it, then save."
            )
        save_program(path, device, list(self.model.modules()), "the sampler's program")

    def __getattr__(self, name: str) -> Any:
        if name in _RENAMED:
            raise AttributeError(f"{name} is called {_RENAMED[name]} now.")
        return super().__getattr__(name)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def optimize_sampler(
    model: nn.Module,
    n_steps: int | None = None,
    *,
    timesteps: Tensor | Sequence[float] | None = None,
    example_inputs: Arguments | None = None,
    conditioning: Conditioning = Exact(),  # noqa: B008 (frozen)
    roles: Mapping[str, str] | None = None,
    mode: str | None = None,
    backend: str = "inductor",
    byte_budget: int | None = None,
    verify: Verify = "trajectory",
    method: str = "forward",
    program: str | PathLike[str] | None = None,
) -> Sampler:
    """Make a drop-in for `model` in a sampling loop, with its time conditioning taken out of the loop.

    Args:
        model: The denoiser, in eval mode. Nothing is asked of its attribute or argument names.
        n_steps: Steps of a trajectory. Optional where `timesteps` are given.
        timesteps: The values that the model will be given as its timestep, ``[n_steps]``, and no others. Without them
            timesteps of any dtype are learned as they come, and up to ``4 * n_steps`` of them are kept.
        example_inputs: Arguments of one call: a tuple, a dictionary of keywords, or a pair (args, kwargs). With them
            the work is done now, without them at the first call.
        conditioning: `Exact` computes rows one step at a time, `Batched` all steps in one batch. `Rank` uses no rows
            and serves any timestep of a range approximately.
        roles: Argument -> "step" (the timestep), "request" or "live" (the latent). Others are guessed.
        mode: As for `compile_training_step`; None is ``"max-autotune"`` on CUDA and ``"default"`` elsewhere.
        backend: As for `compile_training_step`.
        byte_budget: Upper limit of the table in bytes; see `hoist_time_conditioning`.
        verify: When a checksum compares the hoisted weights, which sees writes that no version counts: at the start of
            each "trajectory", "always" (at every call) or "never".
        method: The model's method to stand in for, ``"forward_with_cfg"`` for example. The sampler is called as the
            method is, and also has it under this name.
        program: A folder that ``sampler.save_program(folder)`` wrote in another process: what it holds is not compiled
            again. It is trusted as code is.

    Returns:
        A `Sampler`.

    Raises:
        ValueError: For a model in training mode, with weights that are no plain tensors, or with hooks that move
            weights or keep state (offloading, caching); for a method that the model does not have; for neither
            `n_steps` nor `timesteps`, or if they disagree; for an unknown role, argument, mode or `verify`; for a
            `Rank` without a range.
        TypeError: For a `model`, `timesteps`, `roles`, `conditioning` or `example_inputs` of another kind.

    Example:
        >>> import torch, fusion_compile as fc
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x, t):
        ...         return x * t[:, None]
        >>> sampler = fc.optimize_sampler(Model().eval(), timesteps=[1.0, 0.5], mode="eager")
        >>> sampler.sample(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; optimize_sampler needs a torch.nn.Module.")
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode, so dropout would be frozen into the table; call model.eval()."
        )
    if not isinstance(method, str) or not callable(getattr(model, method, None)):
        raise ValueError(
            f"method={method!r} is no method of {type(model).__name__}; pass the name of one that takes the latent and "
            f"the timestep, 'forward_with_cfg' for example."
        )
    refuse_unservable(model)
    schedule = None if timesteps is None else as_schedule(timesteps)
    options = SamplerOptions(
        count_steps(n_steps, schedule),
        schedule,
        conditioning=conditioning,
        roles=roles,
        mode=mode,
        backend=backend,
        byte_budget=byte_budget,
        verify=verify,
        method=method,
    )
    given = None if example_inputs is None else as_args_and_kwargs(example_inputs)
    sampler = Sampler(model, options)
    if program is not None:
        refuse_uncompiled(resolve_mode(mode, device_of(model)), backend)
        load_program(program, device_of(model), list(model.modules()))
    if given is not None:
        sampler.prepare(*given)
    return sampler
