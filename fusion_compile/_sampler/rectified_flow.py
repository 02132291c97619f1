"""Euler's method along a rectified flow, and the calls of a model that it makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_compile._sampler.graph.call import Call


def refuse_other_times(timesteps: Tensor) -> None:
    """Raise ValueError unless `timesteps` ``[n]`` lie in [0, 1]."""
    if float(timesteps.max()) > 1 or float(timesteps.min()) < 0:
        raise ValueError(
            f"sample() integrates a rectified flow with t in [0, 1] and the schedule begins "
            f"{timesteps[:3].tolist()}; write the loop of your scheduler around sampler(x, t, ...)."
        )


def flow_calls(
    signature: inspect.Signature,
    roles: Mapping[str, str],
    noise: Tensor,
    t: Tensor,
    request: Sequence[Any],
    conditioning: Mapping[str, Any],
    unconditional: Any,
    call_named: Callable[[Mapping[str, Any], Collection[str]], Call],
) -> tuple[str, list[Call]]:
    """Return the name of the live argument, and the calls of the first step.

    The second call, unless `unconditional` is None, has `unconditional` in place of the request. `roles`: of the
    arguments that have one. `call_named`: makes a call of named arguments, of which some are meant by keyword.
    Raises ValueError unless exactly one argument is live and one is the timestep, for more
    requests than arguments, and if the two requests have different shapes.
    """
    names = list(signature.parameters)
    live = [n for n in names if roles.get(n) == "live"]
    step = [n for n in names if roles.get(n) == "step"]
    if len(live) != 1 or len(step) != 1:
        raise ValueError(
            f"sample() needs one live argument and one timestep among {names} and finds {live} and {step}; pass "
            f"roles=, or write the loop around sampler(x, t, ...)."
        )
    others = [n for n in names if n not in (*live, *step, *conditioning)]
    if len(request) > len(others):
        raise ValueError(f"sample() got {len(request)} requests for the arguments {others}.")
    asked = {**dict(zip(others, request, strict=False)), **conditioning}
    requests = [asked]
    if unconditional is not None:
        places = [n for n in names if n in asked]
        if not isinstance(unconditional, Mapping):
            values = unconditional if isinstance(unconditional, tuple) else (unconditional,)
            unconditional = dict(zip(places, values, strict=False))
        requests.append({**asked, **unconditional})
    calls = [call_named({live[0]: noise, step[0]: t, **r}, conditioning) for r in requests]
    if len(calls) == 2 and calls[0].key != calls[1].key:
        raise ValueError("unconditional must have the shapes and dtypes of the request in whose place it stands.")
    return live[0], calls


def euler(
    noise: Tensor, timesteps: Tensor, guidance_scale: float, velocities: Callable[[int, Tensor], Sequence[Any]]
) -> Tensor:
    """Integrate from `noise` at ``timesteps[0]`` to data at 0, along `timesteps` ``[n]``; never waits for the device.

    `velocities`: (index of the step, x) -> the model's output, then its output for the unconditional request if there
    is one.
    """
    times = [*timesteps.double().tolist(), 0.0]
    x = noise
    for i in range(len(timesteps)):
        v, *without = [_one_tensor_like(noise, out) for out in velocities(i, x)]
        if without:
            v = without[0] + guidance_scale * (v - without[0])
        x = (x - (times[i] - times[i + 1]) * v).to(noise.dtype)
    return x


def first_timestep(timesteps: Tensor, noise: Tensor, like: Tensor | None) -> Tensor:
    """The first of `timesteps`, ``[B]`` in the noise's dtype, or shaped and typed as an earlier timestep `like`."""
    first = timesteps[0]
    if like is not None:
        shape = like.shape if like.dim() == 0 else torch.Size((len(noise), *like.shape[1:]))
        return first.to(like.device, like.dtype).expand(shape).clone()
    return first.to(noise.device, noise.dtype).expand(len(noise)).clone()


def _one_tensor_like(noise: Tensor, out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    if not isinstance(out, Tensor) or out.shape != noise.shape:
        raise ValueError(
            f"the model gives {list(out.shape) if isinstance(out, Tensor) else type(out).__name__} for noise of "
            f"{list(noise.shape)}; sample() needs a velocity of the same shape."
        )
    return out
