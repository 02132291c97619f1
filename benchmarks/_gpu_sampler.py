"""The sampler on a GPU: exactness, one graph a step, waits, freed memory, learned rows, weights on the CPU, rank."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator

import _cuda_graph_probe as probe
import torch
from _gpu_setting import Setting, why
from _measure import tensor_bytes, wait
from _rows import Check, NotRun, Rows
from _training_loops import images
from torch import Tensor

import fusion_compile as fc
from fusion_compile.sampler import Sampler


def sampler(rows: Rows, setting: Setting) -> None:
    """Exactness, capture and memory of `optimize_sampler`."""
    n_steps, size = (3, 2) if setting.dry else (20, 4)
    model = setting.model().eval()
    x, y = images(model, size, setting.device)
    made: list[Sampler] = []

    def times(s: Sampler) -> Iterator[Tensor]:
        for t in s.timesteps.to(setting.device):
            yield t.expand(size).clone()

    def exact(c: Check) -> None:
        eager = fc.optimize_sampler(model, n_steps, mode="eager")
        with torch.no_grad():
            worst = max(float((eager(x, t, y) - model(x, t, y)).abs().max()) for t in times(eager))
        c.require(worst == 0, f"in mode='eager' the sampler differs from the model by {worst:.3g}")
        c.note(f"mode='eager' is bitwise the model at {n_steps} steps")

    def captured(c: Check) -> None:
        with probe.watching() as seen, probe.skipping_is_an_error():
            fast = fc.optimize_sampler(model, n_steps, mode=setting.options("", setting.mode)["mode"])
            made.append(fast)
            with torch.no_grad():
                for t in itertools.chain(times(fast), times(fast), times(fast)):
                    fast(x, t, y)
                before = seen.replays, seen.recordings
                for t in times(fast):
                    fast(x, t, y)
        skips = seen.counted("cudagraph_skips")
        replays, records = seen.replays - before[0], seen.recordings - before[1]
        c.note(f"{replays} replays and {records} recordings in {n_steps} steps, {skips} skips")
        c.require_on_gpu(skips == 0, why(seen))
        c.require_on_gpu(replays == n_steps and records == 0, "not one replay a step")

    def near(c: Check) -> None:
        fast = _made(made)
        compiled = torch.compile(
            model, mode=None if setting.on_gpu else "default", backend="inductor" if setting.on_gpu else "eager"
        )
        ours = theirs = scale = 0.0
        with torch.no_grad():
            for t in times(fast):
                want = model(x, t, y)
                ours = max(ours, float((fast(x, t, y) - want).abs().max()))
                theirs = max(theirs, float((compiled(x, t, y) - want).abs().max()))
                scale = max(scale, float(want.abs().max()))
        c.note(
            f"largest difference from eager {ours:.2e}, of torch.compile(model) {theirs:.2e}, outputs up to {scale:.2g}"
        )
        c.require(ours <= 3 * theirs + 1e-5 * scale, "the sampler is further from eager than torch.compile(model) is")

    def waits_of_the_loop(c: Check) -> None:
        fast = _made(made)
        with warnings.catch_warnings(record=True) as caught, probe.waiting_is_an_error(setting.device, "warn"):
            warnings.simplefilter("always")
            fast.sample(x, y)
        waits = sum("synchroniz" in str(w.message) for w in caught)
        c.require_on_gpu(waits < n_steps, f"sample() waited {waits} times in {n_steps} steps")
        c.note(f"sample() of {n_steps} steps waited {waits} times, all before the loop if fewer than the steps")

    def freed(c: Check) -> None:
        fast = _made(made)
        t = next(times(fast))
        with torch.no_grad():
            want = fast(x, t, y).clone()
        wait(setting.device)
        held = tensor_bytes(model.parameters())
        allocated = torch.cuda.memory_allocated(setting.device) if setting.on_gpu else 0
        told = fast.release_weights(to="drop")
        gone = held - tensor_bytes(model.parameters())
        c.require(told > 0, "nothing was freed")
        if setting.on_gpu:
            torch.cuda.synchronize(setting.device)
            gone = allocated - torch.cuda.memory_allocated(setting.device)
        c.note(f"{told / 2**20:.2f} MiB returned, {gone / 2**20:.2f} seen gone, of {held / 2**20:.2f} MiB of weights")
        c.require_on_gpu(gone >= told, "memory_allocated() fell by less than was returned")
        with torch.no_grad():
            c.require(torch.equal(want, fast(x, t, y)), "the output changed")

    rows.check("exact against the model", exact)
    rows.check("the body is one CUDA graph", captured)
    rows.check("as near to eager as torch.compile(model)", near)
    rows.check("sample() does not wait in its loop", waits_of_the_loop)
    rows.check("the bytes told are freed", freed)


def sampler_modes(rows: Rows, setting: Setting) -> None:
    """Check learned rows, unknown timesteps, weights on the CPU, and rank conditioning."""
    n_steps, size = (3, 2) if setting.dry else (20, 4)
    model = setting.model().eval()
    x, y = images(model, size, setting.device)
    schedule = torch.linspace(1, 0, n_steps + 1)[:-1].to(setting.device)
    how = setting.options("", setting.mode)

    def one_trajectory(sampler: Sampler) -> list[Tensor]:
        with torch.no_grad():
            return [sampler(x, t.expand(size).clone(), y) for t in schedule]

    def learned(c: Check) -> None:
        sampler = fc.optimize_sampler(model, n_steps, **how)
        for _ in range(4):
            one_trajectory(sampler)
        with warnings.catch_warnings(record=True) as caught, probe.waiting_is_an_error(setting.device, "warn"):
            warnings.simplefilter("always")
            one_trajectory(sampler)
        waits = sum("synchroniz" in str(w.message) for w in caught)
        c.note(f"a trajectory over learned rows of {n_steps} steps waited {waits} times, but for an event at its start")
        c.require_on_gpu(waits == 0, f"a trusted trajectory waited {waits} times")

    def missed(c: Check) -> None:
        sampler = fc.optimize_sampler(model, n_steps, timesteps=schedule, verify="never", **how)
        for _ in range(3):
            one_trajectory(sampler)
        unknown = torch.full((size,), 0.123456, device=setting.device)
        with torch.no_grad():
            out = sampler(x, unknown, y)
        wait(setting.device)
        if not setting.on_gpu:
            c.require_on_gpu(False, "")
            return
        c.require(bool(out.isnan().all()), "an unknown timestep of a trusted caller did not give NaN")
        try:
            one_trajectory(sampler)
            c.require(False, "nobody said that an unknown timestep was asked for")
        except RuntimeError as error:
            c.require("0.1234" in str(error), f"the message does not name the timestep: {error}")
        c.note("NaN, then a RuntimeError that names the timestep")

    def fetched(c: Check) -> None:
        kept = copy.deepcopy(model)
        sampler = fc.optimize_sampler(kept, n_steps, timesteps=schedule, mode="eager")
        one_trajectory(sampler)
        before = torch.cuda.memory_allocated() if setting.on_gpu else 0
        told = sampler.release_weights(to="cpu")
        gone = before - torch.cuda.memory_allocated() if setting.on_gpu else 0
        c.require_on_gpu(0 < told <= gone, f"{told} bytes returned, {gone} gone from the allocator")
        t = schedule[1].expand(size).clone()
        with torch.no_grad():
            c.require(torch.equal(sampler(x, t, (y + 1) % 10), model(x, t, (y + 1) % 10)), "a new request differs")
        c.note(f"{told / 2**20:.2f} MiB in main memory; a new request is bitwise the model's")

    def ranked(c: Check) -> None:
        sampler = fc.optimize_sampler(model, n_steps, conditioning=fc.Rank(4 if setting.dry else 64, (0.0, 1.0)), **how)
        for _ in range(3):
            one_trajectory(sampler)
        with probe.watching() as seen, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with probe.waiting_is_an_error(setting.device, "warn"):
                outs = one_trajectory(sampler)
        waits = sum("synchroniz" in str(w.message) for w in caught)
        with torch.no_grad():
            wants = [model(x, t.expand(size).clone(), y) for t in schedule]
        gap = max(float((a - b).norm() / b.norm()) for a, b in zip(outs, wants, strict=True))
        rank = sampler.report.programs[0].rank
        c.note(f"{seen.replays} replays in {n_steps} steps, {waits} waits; outputs {gap:.2e} off in norm; {rank}")
        c.require_on_gpu(seen.replays == n_steps and waits <= 2, "not one replay a step without waits")

    def moved(c: Check) -> None:
        own = copy.deepcopy(model)
        sampler = fc.optimize_sampler(own, n_steps, timesteps=schedule, **how)
        one_trajectory(sampler)
        weights = {name: tensor.clone() * 1.01 for name, tensor in own.state_dict().items()}
        with probe.watching() as seen:
            own.load_state_dict(weights, assign=True)
            outs = one_trajectory(sampler)
        with torch.no_grad():
            wants = [own(x, t.expand(size).clone(), y) for t in schedule]
        gap = max(float((a - b).norm() / b.norm()) for a, b in zip(outs, wants, strict=True))
        c.note(f"{seen.recordings} recordings, {seen.replays} replays in {n_steps} steps; {gap:.2e} off in norm")
        c.require(gap < 1e-2, "the loop reads weights that are no longer the model's")
        c.require_on_gpu(seen.recordings == 1, "weights at other addresses must be recorded once")

    rows.check("weights that were replaced", moved)
    rows.check("rows that were learned", learned)
    rows.check("an unknown timestep on trust", missed)
    rows.check("weights in main memory", fetched)
    rows.check("rank", ranked)


def _made(made: list[Sampler]) -> Sampler:
    if not made:
        raise NotRun("the sampler was not built")
    return made[0]
