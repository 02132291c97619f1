"""Tests: state over ranks, in both forms, is one process's on the batches laid together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from fusion_compile._ranks.division import OPTIMIZER, REPLICATE
from tests.ranks import programs as P
from tests.ranks.conftest import assert_equal_to_one
from tests.ranks.full_scenarios import full_of_every_kind, of_two
from tests.ranks.scenarios import QUICK, collectives, trained
from tests.several_processes import on_ranks


@pytest.mark.parametrize("form", ["replicated", "divided"])
@pytest.mark.parametrize("optimizer", QUICK)
def test_two_ranks_are_one_process(two_ranks: Any, one_process: Any, form: str, optimizer: str) -> None:
    for found in two_ranks(form):
        assert_equal_to_one(found[optimizer], one_process(optimizer))


def test_a_rank_keeps_and_orthogonalizes_its_own_matrices(two_ranks: Any) -> None:
    first, second = two_ranks("optimizer_bytes")
    whole = first["replicate"]
    assert (first["optimizer"]["matrices"], second["optimizer"]["matrices"], whole["matrices"]) == (9, 6, 15)
    assert first["optimizer"]["bytes"] + second["optimizer"]["bytes"] == whole["bytes"]  # nothing is filled up


@pytest.mark.filterwarnings("ignore:all 64 ranks have the random seed")
@pytest.mark.usefixtures("third_of_64")
def test_rank_3_of_64_divides_among_as_many_as_have_a_matrix() -> None:
    step = P.step_of("muon", P.mesh_of(64), rehearse=False, backend="aot_eager")
    step(*P.part(P.whole_batches(1)[0], 0, 1))
    momentum = [t.shape for k, t in step._state.items() if k.startswith("optimizer/") and t.ndim == 3]
    assert {len(shape) for shape in momentum} == {3} and {shape[0] for shape in momentum} == {1}  # of 5, among 4
    found = collectives(step)
    counts = {name: found.count(name) for name in set(found)}
    # three banks of matrices: to their owners, over the 16 groups, and back; the flat bank; two packed vectors
    assert counts == {"reduce_scatter_tensor": 3, "all_reduce": 4, "all_gather_into_tensor": 5}


def of_every_kind(rank: int, world: int) -> Any:
    mesh = P.mesh_of(world)
    optimizers = [*P.OPTIMIZERS, "lion", "sf_adamw"]
    found: dict[Any, Any] = {
        (o, form): trained(P.step_of(o, mesh, model=P.net(rank), shard=form), rank, world)
        for o in optimizers
        for form in (REPLICATE, OPTIMIZER)
    }
    two = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
    found["sf_normuon", "copies"] = trained(P.step_of("sf_normuon", two, model=P.net(rank)), rank, world)
    return found


@pytest.mark.exhaustive
def test_every_recipe_in_both_forms_on_four_ranks(one_process: Any) -> None:
    for found in on_ranks(4, of_every_kind):
        for (optimizer, _), seen in found.items():
            assert_equal_to_one(seen, one_process(optimizer))


def test_weights_that_no_rank_has_whole_are_one_process(one_process: Any) -> None:
    first, second = of_two("full")
    for found in (first, second):
        assert_equal_to_one(found, one_process("sf_normuon"))
    whole, flat = first["whole bytes"], 760 * 4  # of 7,160 entries; more than one in 16, so they are cut in halves
    nothing = 44 * 4  # one entry stands for each parameter
    assert first["bytes"] == flat // 2 + (whole - flat) * 3 // 5 + nothing  # of 5 matrices a bank, 3 and 2
    assert second["bytes"] == flat // 2 + (whole - flat) * 2 // 5 + nothing


@pytest.mark.exhaustive
def test_captured_they_are_gathered_in_the_program(one_process: Any) -> None:
    for seen in of_two("full_captured"):
        for capture in ("read", "run", "unrehearsed"):
            assert_equal_to_one(seen[capture], one_process("muon"))
        assert_equal_to_one(seen["accumulated"], one_process("muon", 2))
        # Four banks, gathered once where the step is read (Inductor gathers again), for each forward and each backward
        # where it is run, and reduced once; and two packed vectors.
        for capture, gathers in (("read", 4), ("run", 8), ("accumulated", 16)):
            found = seen[capture]["collectives"]
            counts = {name: found.count(name) for name in set(found)}
            assert counts == {"reduce_scatter_tensor": 4, "all_gather_into_tensor": gathers + 2}


@pytest.mark.exhaustive
def test_they_are_alike_in_half_precision() -> None:
    for seen in of_two("full_half_precision"):
        for form in ("master", "exact", "kahan", "stochastic"):
            assert seen[form, "bits"] and seen[form, "same"]
            assert seen[form, "apart"] <= 2**-8  # a step of bf16 at 1


@pytest.mark.exhaustive
def test_they_are_one_process_on_four_ranks_and_in_copies(one_process: Any) -> None:
    for found in on_ranks(4, full_of_every_kind):
        copies = found.pop("copies")
        assert copies["copies alike"]
        assert_equal_to_one(copies, one_process("sf_normuon"))
        for optimizer, seen in found.items():
            assert_equal_to_one(seen, one_process(optimizer))


def whose_state_decides(rank: int, world: int) -> Any:
    return {
        (o, form): trained(P.step_of(o, P.mesh_of(world), model=P.net(rank), shard=form), rank, world, 2)
        for o in ("soap", "full_fusion")
        for form in (REPLICATE, OPTIMIZER)
    }


@pytest.mark.exhaustive
def test_recipes_with_periodic_work_are_the_same_divided_and_replicated() -> None:
    """One process is no yardstick: with gradients of low rank a basis is arbitrary in part, and one process with the
    batch in another order differs from itself as much (2e-2 for soap after 5 steps, in fp64, too)."""
    for found in on_ranks(2, whose_state_decides):
        for optimizer in ("soap", "full_fusion"):
            one, other = found[optimizer, REPLICATE], found[optimizer, OPTIMIZER]
            assert one["same"] and other["same"]
            assert float((one["weights"] - other["weights"]).abs().max()) <= 2e-6  # the order of additions


def test_forms_are_known_by_name() -> None:
    with pytest.raises(ValueError, match="shard='rows' is not known; use one of 'replicate', 'optimizer', 'full'"):
        P.step_of("adamw", shard="rows")
    with pytest.raises(ValueError, match="shard='optimizer' without mesh= has no effect"):
        P.step_of("adamw", shard="optimizer")
    with pytest.raises(ValueError, match=r"reduce_dtype=torch\.int8 is no floating-point dtype"):
        P.step_of("adamw", reduce_dtype=torch.int8)
