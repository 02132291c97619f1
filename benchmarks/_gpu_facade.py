"""A recipe in a loop of one's own on a GPU: its update is one CUDA graph, replayed at each step without a wait."""

from __future__ import annotations

import math

import _cuda_graph_probe as probe
import torch
from _gpu_setting import Setting
from _rows import Check, Rows
from _training_loops import images_noise_and_times, loss_given_noise

import fusion_compile as fc

RECIPE = "sf_normuon"


def facade(rows: Rows, setting: Setting) -> None:
    """`as_torch_optimizer` under the ordinary forward and backward, its lr written by hand at every step."""

    def one_graph(c: Check) -> None:
        model = setting.model()
        mode = "eager" if setting.dry else setting.mode
        optimizer = fc.optim.as_torch_optimizer(model, RECIPE, mode=mode)
        batches = [images_noise_and_times(model, setting.batch_size, setting.device, i) for i in range(4)]
        losses, replays, records = [], [], []
        with probe.watching() as seen, probe.skipping_is_an_error():
            for i in range(setting.steps(50)):
                optimizer.param_groups[0]["lr"] = 1e-3 * (1 + 0.1 * math.sin(i))
                optimizer.zero_grad(set_to_none=True)
                loss = loss_given_noise(model, *batches[i % 4])
                loss.backward()
                before = seen.replays, seen.recordings
                if i < 3:  # the first calls compile, warm up and record
                    optimizer.step()
                else:
                    with probe.waiting_is_an_error(setting.device):
                        optimizer.step()
                replays.append(seen.replays - before[0])
                records.append(seen.recordings - before[1])
                losses.append(loss.detach())
        values = torch.stack(losses).tolist()
        c.require(all(map(math.isfinite, values)), f"losses that are not finite: {values[-3:]}")
        c.require(setting.dry or values[-1] < values[0], f"the loss went from {values[0]:.3f} to {values[-1]:.3f}")
        c.require(seen.counted("cudagraph_skips") == 0 or not c.on_gpu, "Inductor left CUDA graphs alone")
        c.require_on_gpu(len(seen.compiled) == 1, f"Inductor finished {len(seen.compiled)} graphs, not one")
        c.require_on_gpu(not any(records[3:]), f"recorded again at steps {[i for i, n in enumerate(records) if n]}")
        c.require_on_gpu(set(replays[3:]) == {1}, f"replays at each step: {sorted(set(replays[3:]))}, not one")
        copied = seen.counted("cudagraph_recorded_non_static_inputs")
        c.note(
            f"{len(replays)} steps, {sum(replays)} replays, {copied} inputs copied per replay, loss {values[-1]:.3f}"
        )

    rows.check("one CUDA graph, no wait", one_graph)
