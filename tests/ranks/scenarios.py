"""What ranks do alike, and what one of them does differently: each scenario runs on every rank and says what it saw."""

from __future__ import annotations

import copy
import tempfile
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from tests.ranks import programs as P
from tests.several_processes import said_by

CAPTURED: dict[str, Any] = {"backend": "aot_eager"}
QUICK = ("adamw", "muon", "sf_normuon")


def seen(rank: int, world: int, name: str) -> Any:
    """What a scenario returns. ``name@captured``: with captured steps."""
    torch.manual_seed(100 + rank)
    bare, _, way = name.partition("@")
    return globals()[bare](rank, world, **(CAPTURED if way else {}))


def trained(step: fc.TrainingStep, rank: int, world: int, count: int = 5) -> Any:
    losses = [float(step(*P.part(batch, rank, world))) for batch in P.whole_batches(count)]
    numbers = {name: float(t) for name, t in step.metrics.items() if not t.ndim}
    return {
        "weights": P.flat(step.model),
        "losses": losses,
        "metrics": numbers,
        "same": P.same_everywhere(P.flat(step.model)),
    }


# ---------------------------------------------------------------------- alike


def replicated(rank: int, world: int) -> Any:
    return {
        o: trained(P.step_of(o, P.mesh_of(world), model=P.net(rank), shard="replicate"), rank, world) for o in QUICK
    }


def divided(rank: int, world: int) -> Any:
    return {o: trained(P.step_of(o, P.mesh_of(world), model=P.net(rank)), rank, world) for o in QUICK}


def captured(rank: int, world: int) -> Any:
    """By reading and by running, both forms; with the collectives of the graph."""
    found: dict[Any, Any] = {}
    for capture, shard in (("read", "replicate"), ("run", "optimizer")):
        step = P.step_of("muon", P.mesh_of(world), shard=shard, capture=capture, **CAPTURED)
        found[capture] = trained(step, rank, world)
        found[capture]["programs"] = len(step.programs)
        found[capture]["collectives"] = collectives(step)
    return found


def collectives(step: fc.TrainingStep) -> list[str]:
    from fusion_compile._ranks.fingerprint import fingerprint

    return [line.partition(" ")[0] for line in fingerprint(step.programs[-1].graph, {})]


def accumulated(rank: int, world: int) -> Any:
    step = P.step_of("muon", P.mesh_of(world), accumulate=2, **CAPTURED)
    return {**trained(step, rank, world, 2), "collectives": collectives(step)}


def optimizer_bytes(rank: int, world: int) -> Any:
    """Bytes and matrices of Muon's momentum on this rank, in each form."""
    found: dict[Any, Any] = {}
    for shard in ("replicate", "optimizer"):
        step = P.step_of("muon", P.mesh_of(world), shard=shard)
        kept = {k: t for k, t in step._state.items() if k.startswith("optimizer/") and t.ndim == 3}
        found[shard] = {"bytes": sum(t.nbytes for t in kept.values()), "matrices": sum(len(t) for t in kept.values())}
    return found


def uneven(rank: int, world: int, **options: Any) -> Any:
    """Batches of 5 and 3 entries."""
    (x, y), *_ = P.whole_batches(1)
    own = slice(0, 5) if rank == 0 else slice(5, 8)
    step = P.step_of("adamw", P.mesh_of(world), **options)
    loss = float(step(x[own], y[own]))
    return loss, float(step.metrics["grad_norm"]), float(step.metrics["mae"])


def counted(model: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    each = F.mse_loss(model(x), y, reduction="none").mean(-1)
    return (each * mask).sum() / mask.sum(), {"tokens": mask.sum()}


def weighed(rank: int, world: int) -> Any:
    (x, y), *_ = P.whole_batches(1)
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 1])
    own = P.part((x, y, mask), rank, world)
    step = P.step_of("adamw", P.mesh_of(world), loss=counted, weigh_by="tokens")
    return {
        "loss": float(step(*own)),
        "grad_norm": float(step.metrics["grad_norm"]),
        "tokens": float(step.metrics["tokens"]),
    }


def not_finite(rank: int, world: int) -> Any:
    found: dict[Any, Any] = {}
    for shard in ("replicate", "optimizer"):
        step = P.step_of("sf_normuon", P.mesh_of(world), shard=shard)
        first, second, third = (P.part(batch, rank, world) for batch in P.whole_batches(3))
        step(*first)
        before = P.flat(step.model), {k: t.clone() for k, t in step._state.items() if k.startswith("optimizer/")}
        bad = second[0].clone()
        if rank == world - 1:
            bad[0, 0] = float("nan")
        step(bad, second[1])
        unchanged = torch.equal(before[0], P.flat(step.model)) and all(
            torch.equal(t, step._state[k]) for k, t in before[1].items()
        )
        skipped = int(step.metrics["skipped"])
        step(*third)
        found[shard] = {
            "unchanged": unchanged,
            "skipped": skipped,
            "same": P.same_everywhere(P.flat(step.model)),
            "step": int(step.metrics["step"]),
        }
    return found


def half_precision(rank: int, world: int) -> Any:
    found: dict[Any, Any] = {}
    for form in ("master", "exact", "kahan", "stochastic"):
        for shard in ("replicate", "optimizer"):
            step = P.step_of(
                "muon", P.mesh_of(world), model=P.net(0).bfloat16(), loss=bf16_loss, half_precision=form, shard=shard
            )
            found[form, shard] = {k: v for k, v in trained(step, rank, world, 3).items() if k in ("weights", "same")}
    return found


def bf16_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x.bfloat16()).float(), y)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x)))


def buffers(rank: int, world: int) -> Any:
    torch.manual_seed(rank)
    step: Any = P.step_of("adamw", P.mesh_of(world), model=Normed())
    twin: Any = copy.deepcopy(step.model)
    batch = P.part(P.whole_batches(1)[0], rank, world)
    step(*batch)
    twin(batch[0])
    own = twin.n.running_mean.clone()
    dist.all_reduce(own)
    mean = step.model.n.running_mean
    return {
        "mean": torch.allclose(mean, own / world),
        "same": P.same_everywhere(mean),
        "batches": int(step.model.n.num_batches_tracked),
    }


def gradients_and_averages(rank: int, world: int) -> Any:
    model = P.net(0)
    ema = fc.EMA(model, decay=0.5)
    step = P.step_of("muon", P.mesh_of(world), model=model, keep_gradients=True, ema=ema)
    found = trained(step, rank, world, 2)
    found["gradient"] = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    found["average"] = P.flat(ema.model)
    return found


def reduced_in_bf16(rank: int, world: int) -> Any:
    step = P.step_of("adamw", P.mesh_of(world), reduce_dtype=torch.bfloat16, **CAPTURED)
    return trained(step, rank, world, 2)


def seeds(rank: int, world: int) -> Any:
    def said() -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            P.step_of("adamw", P.mesh_of(world), model=model)
        return " ".join(str(w.message) for w in caught)

    model = P.net(7)
    torch.manual_seed(7)
    alike = said()
    model = P.net(7)
    torch.manual_seed(7 + rank)
    return {"alike": alike, "apart": said()}


def saved(rank: int, world: int) -> Any:
    """Saved in one form, loaded in the other and in the same, and trained on."""
    found: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory() as own:
        folders: list[str] = [own]
        dist.broadcast_object_list(folders, 0)
        for shard, other in (("optimizer", "replicate"), ("replicate", "optimizer")):
            folder = f"{folders[0]}/{shard}"
            step = P.step_of("sf_normuon", P.mesh_of(world), shard=shard)
            for batch in P.whole_batches(2):
                step(*P.part(batch, rank, world))
            step.save(folder)
            drawn = torch.rand(3)
            kept = step.state_dict()
            last = P.part(P.whole_batches(3)[2], rank, world)
            step(*last)
            for form in (shard, other):
                again = P.step_of("sf_normuon", P.mesh_of(world), model=P.net(5), shard=form)
                again.load(folder)
                found[shard, form, "random"] = torch.equal(torch.rand(3), drawn)
                found[shard, form, "bits"] = equal_states(again.state_dict(), kept)
                again(*last)
                found[shard, form, "goes on"] = float((P.flat(again.model) - P.flat(step.model)).abs().max())
            warm = P.step_of("muon", P.mesh_of(world), shard=other)
            found[shard, "warm"] = str(warm.warm_start(folder))
            warm(*last)
            if rank == 0:
                from fusion_compile._state import checkpoint_folder

                found[shard, "folder"] = checkpoint_folder.load(folder, torch.device("cpu"))
        dist.barrier()
    return found


def equal_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    sections = ("model", "optimizer", "counts", "buffers", "rng")
    return all(
        one[s].keys() == other[s].keys() and all(torch.equal(t, other[s][n]) for n, t in one[s].items())
        for s in sections
        if s != "rng"
    )


# ---------------------------------------------------------------------- one rank does something else


def refusals(rank: int, world: int, **options: Any) -> Any:
    """A batch that one rank refuses, then a good one."""
    step = P.step_of("muon", P.mesh_of(world), **options)
    good = P.part(P.whole_batches(1)[0], rank, world)
    step(*good)
    before = P.flat(step.model)
    bad = (good[0].clone().requires_grad_(), good[1]) if rank == 1 else good
    said = said_by(partial(step, *bad))
    unchanged = torch.equal(before, P.flat(step.model))
    step(*good)
    return {"said": said, "unchanged": unchanged, "step": int(step.metrics["step"])}


def numbers(rank: int, world: int) -> Any:
    step = P.step_of("adamw", P.mesh_of(world))
    good = P.part(P.whole_batches(1)[0], rank, world)
    step(*good)
    step.hyperparameters["lr"] = 1e-3 if rank == 0 else 2e-3
    apart = said_by(lambda: step(*good))
    step.hyperparameters["lr"] = lambda n: 1e-3 * (1 + n * rank)
    schedule = said_by(lambda: step(*good))
    step.hyperparameters["lr"] = 1e-3
    step(*good)
    return {
        "apart": apart,
        "schedule": schedule,
        "step": int(step.metrics["step"]),
        "same": P.same_everywhere(P.flat(step.model)),
    }


def writes(rank: int, world: int) -> Any:
    step = P.step_of("muon", P.mesh_of(world))
    good = P.part(P.whole_batches(1)[0], rank, world)
    step(*good)
    weight: Any = step.model.get_parameter("first.weight")
    with torch.no_grad():
        weight.mul_(0.5)
    alike = said_by(lambda: step(*good))
    with torch.no_grad():
        weight.mul_(1.0 + rank)
    apart = said_by(lambda: step(*good))
    dist.broadcast(weight.data, 0)
    with torch.no_grad():
        weight.mul_(1.0)
    step(*good)
    return {"alike": alike, "apart": apart, "same": P.same_everywhere(P.flat(step.model))}


def other_acts(rank: int, world: int) -> Any:
    """One rank evaluates alone, saves alone, loads alone, is released alone."""
    step = P.step_of("muon", P.mesh_of(world))
    good = P.part(P.whole_batches(1)[0], rank, world)
    start = copy.deepcopy(step.state_dict())
    step(*good)
    found: dict[Any, Any] = {"evaluated": float(step.evaluate(*good)["loss"]) if rank == 0 else 0.0}
    step(*good)
    with tempfile.TemporaryDirectory() as folder:
        found["saves alone"] = said_by(lambda: step.save(folder) if rank == 0 else step(*good))
    step(*good)
    found["loads alone"] = said_by(lambda: step.load_state_dict(start) if rank == 0 else step(*good))
    found["goes on"] = said_by(lambda: step(*good))
    if rank == 0:
        step.release()
    found["released"] = said_by(lambda: step(*good))
    return found


def loss_that_raises(rank: int, world: int) -> Any:
    calls = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if rank == 1 and x[0, 0] > 100:
            raise ValueError("an outlier")
        return F.mse_loss(model(x), y)

    step = P.step_of("adamw", P.mesh_of(world), loss=loss)
    good = P.part(P.whole_batches(1)[0], rank, world)
    step(*good)
    said = said_by(lambda: step(good[0] + 1000, good[1]))
    step(*good)
    return {"said": said, "step": int(step.metrics["step"])}


def other_programs(rank: int, world: int, **options: Any) -> Any:
    """One rank returns another metric."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = F.mse_loss(model(x), y)
        return value, {"extra": value.detach()} if rank == 1 else {}

    good = P.part(P.whole_batches(1)[0], rank, world)
    return said_by(lambda: P.step_of("adamw", P.mesh_of(world), loss=loss, **options)(*good))


def talks(rank: int, world: int, **options: Any) -> Any:
    """The loss sums something over ranks itself."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = F.mse_loss(model(x), y)
        summed = value.detach().clone()
        dist.all_reduce(summed)
        return value, {"summed": summed}

    good = P.part(P.whole_batches(1)[0], rank, world)
    return said_by(lambda: P.step_of("adamw", P.mesh_of(world), loss=loss, **options)(*good))


def unreadable_on_one(rank: int, world: int) -> Any:
    """One rank's loss cannot be captured by reading."""

    def waits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(model(x), y)
        return value * (2.0 if rank == 1 and value.item() > 0 else 1.0)

    good = P.part(P.whole_batches(1)[0], rank, world)
    return said_by(lambda: P.step_of("adamw", P.mesh_of(world), loss=waits, capture="read", **CAPTURED)(*good))


def compiles_alone(rank: int, world: int) -> Any:
    """One rank has another batch shape, and one captures again: the others only run."""
    step = P.step_of("muon", P.mesh_of(world), **CAPTURED)
    (x, y), *_ = P.whole_batches(1)
    step(*P.part((x, y), rank, world))
    own = slice(0, 5) if rank == 0 else slice(5, 8)
    step(x[own], y[own])
    if rank == 1:
        step.recapture()
    loss = float(step(*P.part((x, y), rank, world)))
    return {"loss": loss, "same": P.same_everywhere(P.flat(step.model)), "step": int(step.metrics["step"])}


def proof_fails_on_one(rank: int, world: int, **options: Any) -> Any:
    """One rank's first step is not the ordinary loop's."""
    from fusion_compile._step.proof import Proof

    good = P.part(P.whole_batches(1)[0], rank, world)
    former = Proof.objection
    if rank == 1:
        Proof.objection = lambda self, state: "its loss is another"  # type: ignore[method-assign]
    try:
        return said_by(lambda: P.step_of("adamw", P.mesh_of(world), **options)(*good))
    finally:
        Proof.objection = former  # type: ignore[method-assign]


def made_otherwise(rank: int, world: int) -> Any:
    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("seen", torch.zeros(4, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)  # type: ignore[operator]
            return super().forward(x)

    mesh, good = P.mesh_of(world), P.part(P.whole_batches(1)[0], rank, world)
    return {
        "depth": said_by(lambda: P.step_of("adamw", mesh, model=P.net(depth=5 + rank))),
        "accumulate": said_by(lambda: P.step_of("adamw", mesh, accumulate=1 + rank)),
        "bad option": said_by(lambda: P.step_of("adamw", mesh, half_precision="none" if rank else "master")),
        "bad on all": said_by(lambda: P.step_of("adamw", mesh, half_precision="none")),
        "without mesh": said_by(lambda: P.step_of("adamw")),
        "integer buffer": said_by(lambda: P.step_of("adamw", mesh, model=Counts())(*good)),
    }
