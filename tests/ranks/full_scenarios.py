"""Scenarios of ``shard="full"``: what each rank keeps of the weights, and that nothing reads what it does not keep."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fusion_compile as fc
from tests.ranks import programs as P
from tests.ranks.scenarios import CAPTURED, bf16_loss, collectives, equal_states
from tests.several_processes import on_ranks, said_by


@functools.cache
def of_two(name: str) -> list[Any]:
    """What each of two ranks saw in the scenario of that name."""
    return on_ranks(2, globals()[name])


def full_step(optimizer: str, rank: int, world: int, **options: Any) -> fc.TrainingStep:
    return P.step_of(optimizer, P.mesh_of(world), model=P.net(rank), shard="full", **options)


def trained_full(step: fc.TrainingStep, rank: int, world: int, count: int = 5) -> dict[str, Any]:
    losses = [float(step(*P.part(batch, rank, world))) for batch in P.whole_batches(count)]
    numbers = {name: float(t) for name, t in step.metrics.items() if not t.ndim}
    with step.gathered() as model:
        weights = P.flat(model)
    return {"weights": weights, "losses": losses, "metrics": numbers, "same": P.same_everywhere(weights)}


def weight_bytes(step: fc.TrainingStep) -> int:
    """Bytes of weights on this rank: what the state holds, and the memory behind the model's parameters."""
    kept = {k: t.untyped_storage() for k, t in step._state.items() if k.startswith(("params/", "module/", "point/"))}
    with step._residence.plain():
        kept |= {n: p.detach().untyped_storage() for n, p in step.model.named_parameters()}
    return sum({memory.data_ptr(): memory.nbytes() for memory in kept.values()}.values())


def full(rank: int, world: int) -> Any:
    step = full_step("sf_normuon", rank, world)
    found = trained_full(step, rank, world)
    found["bytes"] = weight_bytes(step)
    found["whole bytes"] = weight_bytes(P.step_of("sf_normuon", P.mesh_of(world), shard="replicate"))
    return found


def full_is_not_read(rank: int, world: int) -> Any:
    """What a parameter answers between steps, and what a step refuses."""
    step = full_step("muon", rank, world)
    good = P.part(P.whole_batches(1)[0], rank, world)
    step(*good)
    weight: Any = step.model.get_parameter("blocks.0.a.weight")
    found: dict[Any, Any] = {
        "shape": tuple(weight.shape),
        "numbers": sum(p.numel() for p in step.model.parameters()),
        "sum": said_by(lambda: weight.sum()),
        "data": said_by(lambda: weight.data),
        "written": said_by(lambda: weight.copy_(torch.ones(16, 16))),
        "called": said_by(lambda: step.model(good[0])),
        "state_dict": said_by(lambda: step.model.state_dict()),
        "copied": said_by(lambda: copy.deepcopy(step.model)),
        "evaluated": said_by(lambda: step.evaluate(*good)),
        "explained": [finding.kind for finding in step.explain().findings],
    }
    with step.gathered() as model:
        loss = P.loss_fn(model, *good)[0]
        found["in gathered"] = float(loss) == float(step.evaluate(*good)["loss"])
        found["step in gathered"] = said_by(lambda: step(*good))
        kept = model.state_dict()["blocks.0.a.weight"]
        before = kept.clone()
    step(*good)
    found["kept stays"] = torch.equal(kept, before)
    return found


def full_writes(rank: int, world: int) -> Any:
    """Weights that are written in `gathered`: alike on all ranks, and apart."""
    step = full_step("muon", rank, world)
    good = P.part(P.whole_batches(1)[0], rank, world)
    step(*good)
    with step.gathered() as model, torch.no_grad():
        model.get_parameter("blocks.1.b.weight").mul_(0.5)
        wanted = P.flat(model)
    with step.gathered() as model:
        alike = torch.equal(P.flat(model), wanted)
    step(*good)
    with step.gathered() as model, torch.no_grad():
        model.get_parameter("blocks.1.b.weight").mul_(1.0 + rank)
    return {"alike": alike, "apart": said_by(lambda: step(*good))}


def full_not_finite(rank: int, world: int) -> Any:
    step = full_step("sf_normuon", rank, world)
    first, second, third = (P.part(batch, rank, world) for batch in P.whole_batches(3))
    step(*first)
    before = {k: t.clone() for k, t in step._state.items() if k.startswith(("optimizer/", "params/"))}
    bad = second[0].clone()
    if rank == world - 1:
        bad[0, 0] = float("nan")
    step(bad, second[1])
    unchanged = all(torch.equal(t, step._state[k]) for k, t in before.items())
    skipped = int(step.metrics["skipped"])
    step(*third)
    return {"unchanged": unchanged, "skipped": skipped, "step": int(step.metrics["step"])}


def full_saved(rank: int, world: int) -> Any:
    """Saved in one form, loaded in the others, and trained on; and a warm start, and the release."""
    found: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory() as own:
        folders: list[str] = [own]
        dist.broadcast_object_list(folders, 0)
        last = P.part(P.whole_batches(3)[2], rank, world)
        for saved, others in (("full", ("full", "optimizer")), ("optimizer", ("full",))):
            step = P.step_of("sf_normuon", P.mesh_of(world), shard=saved)
            for batch in P.whole_batches(2):
                step(*P.part(batch, rank, world))
            step.save(f"{folders[0]}/{saved}")
            kept = step.state_dict()
            step(*last)
            with step.gathered() as model:
                after = P.flat(model)
            for form in others:
                again = P.step_of("sf_normuon", P.mesh_of(world), model=P.net(5), shard=form)
                again.load(f"{folders[0]}/{saved}")
                found[saved, form, "bits"] = equal_states(again.state_dict(), kept)
                again(*last)
                with again.gathered() as model:
                    found[saved, form, "goes on"] = float((P.flat(model) - after).abs().max())
        warm = full_step("muon", rank, world)
        found["warm"] = str(warm.warm_start(f"{folders[0]}/optimizer"))
        warm(*last)
        with warm.gathered() as model:
            now = P.flat(model)
        found["released"] = torch.equal(P.flat(warm.release()), now)
        dist.barrier()
    return found


def full_refusals(rank: int, world: int) -> Any:
    mesh, model = P.mesh_of(world), P.net(0)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if rank == 1 and x[0, 0] > 100:
            raise ValueError("an outlier")
        return F.mse_loss(model(x), y)

    good = P.part(P.whole_batches(1)[0], rank, world)
    step = P.step_of("muon", mesh, model=P.net(0), loss=loss, shard="full")
    step(*good)
    found = {"raises": said_by(lambda: step(good[0] + 1000, good[1]))}
    step(*good)
    found["alone"] = said_by(lambda: step.gathered().__enter__() if rank == 0 else step(*good))
    step(*good)
    found["ema"] = said_by(lambda: P.step_of("muon", mesh, model=model, shard="full", ema=fc.EMA(model)))
    found["gradients"] = said_by(lambda: P.step_of("muon", mesh, shard="full", keep_gradients=True))
    found["pools"] = said_by(lambda: P.step_of("prodigy", mesh, shard="full", force_spectral=()))
    return found


def published(rank: int, world: int) -> Any:
    """Weights that the model shows every three steps."""
    mesh, found = P.mesh_of(world), dict[Any, Any]()
    given = [P.part(batch, rank, world) for batch in P.whole_batches(5)]
    step = P.step_of("sf_normuon", mesh, model=P.net(0), publish_every=3)
    twin = P.step_of("sf_normuon", mesh, model=P.net(0))
    matrices = [step.model.get_parameter(f"blocks.3.{name}.weight") for name in "abc"]  # what is flat is whole anyway
    theirs = [twin.model.get_parameter(f"blocks.3.{name}.weight") for name in "abc"]
    start, seen = [m.detach().clone() for m in matrices], []
    for batch in given:
        step(*batch)
        twin(*batch)
        seen.append([all(map(torch.equal, matrices, others)) for others in (start, theirs)])
    found["seen"] = seen
    weight: Any = step.model.get_parameter("blocks.0.b.weight")
    with torch.no_grad():
        weight[0, 0] = 1.0
    found["written"] = said_by(lambda: step(*given[0]))
    step.publish()
    found["evaluated"] = float(step.evaluate(*given[0])["loss"]) == float(twin.evaluate(*given[0])["loss"])
    with torch.no_grad():
        for each in (step, twin):
            each.model.get_parameter("blocks.0.b.weight").data[0, 0] = 1.0
    for each in (step, twin):
        each(*given[0])
    found["saved"] = equal_states(step.state_dict(), twin.state_dict())
    found["then"] = torch.equal(P.flat(step.model), P.flat(twin.model))
    for each in (step, twin):
        each(*given[1])
    found["released"] = torch.equal(P.flat(step.release()), P.flat(twin.model))
    found["no use"] = said_by(lambda: P.step_of("muon", mesh, publish_every=2))
    found["no number"] = said_by(lambda: P.step_of("sf_normuon", mesh, publish_every=0))
    return found


# ---------------------------------------------------------------------- slowly


def full_captured(rank: int, world: int) -> Any:
    """By reading and by running, with the collectives of the graph; and with micro-batches."""
    found: dict[Any, Any] = {}
    for capture in ("read", "run"):
        step = full_step("muon", rank, world, capture=capture, **CAPTURED)
        found[capture] = {**trained_full(step, rank, world), "collectives": collectives(step)}
    step = full_step("muon", rank, world, accumulate=2, capture="run", **CAPTURED)
    found["accumulated"] = {**trained_full(step, rank, world, 2), "collectives": collectives(step)}
    step = full_step("muon", rank, world, rehearse=False, **CAPTURED)
    found["unrehearsed"] = trained_full(step, rank, world)
    return found


def full_half_precision(rank: int, world: int) -> Any:
    """bf16 weights in every form, against those of a step that replicates; and loaded again."""
    found: dict[Any, Any] = {}
    batches = [P.part(batch, rank, world) for batch in P.whole_batches(2)]
    for form in ("master", "exact", "kahan", "stochastic"):
        weights = []
        for shard in ("replicate", "full"):
            given: dict[str, Any] = {"half_precision": form, "shard": shard, "loss": bf16_loss}
            step = P.step_of("muon", P.mesh_of(world), model=P.net(0).bfloat16(), **given)
            for batch in batches:
                step(*batch)
            with step.gathered() as model:
                weights.append(P.flat(model))
        again = P.step_of("muon", P.mesh_of(world), model=P.net(3).bfloat16(), **given)
        again.load_state_dict(step.state_dict())
        found[form, "bits"] = equal_states(again.state_dict(), step.state_dict())
        with step.gathered() as model, torch.no_grad():
            model.get_parameter("blocks.0.a.weight").mul_(2)
        step(*batches[0])
        found[form, "same"] = P.same_everywhere(weights[1])
        found[form, "apart"] = float((weights[0] - weights[1]).float().abs().max())
    return found


def full_of_every_kind(rank: int, world: int) -> Any:
    found = {o: trained_full(full_step(o, rank, world), rank, world) for o in [*P.OPTIMIZERS, "lion", "sf_adamw"]}
    two = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
    step = P.step_of("sf_normuon", two, model=P.net(rank), shard="full")
    copies = trained_full(step, rank, world)
    parts = torch.cat([t.reshape(-1) for k, t in step._state.items() if k.startswith(("params/", "optimizer/"))])
    other = [torch.empty_like(parts) for _ in range(2)]
    dist.all_gather(other, parts, group=two.get_group("copies"))
    return {**found, "copies": {**copies, "copies alike": torch.equal(*other)}}
