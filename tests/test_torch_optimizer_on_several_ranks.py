"""Tests: models of libraries under FSDP2, and DistributedDataParallel, train as one process does on the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fusion_compile import optim
from fusion_compile.optim import as_torch_optimizer
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.several_processes import on_ranks
from tests.sharded_models import batches, choice, difference, equal_on_all, give, loss_of, mesh_of, net, sharded

CLOSE = 1e-6
"""Gradients are sums over ranks, in another order than over one batch, and Newton-Schulz runs in fp32."""


def _at(model: nn.Module, name: str, lr: float = 1e-3, **options: Any) -> TorchOptimizer:
    """With rates at which a last bit of a gradient moves no weight by more than `CLOSE`."""
    optimizer = as_torch_optimizer(model, choice(name), lr=lr, **{"mode": "eager", **options})
    for group in optimizer.param_groups:
        group.update({n: min(1e-4, lr) for n in group if n == "scalar_lr"})
    return optimizer


def _equal_to_unsharded(
    make: Callable[[], nn.Module], blocks: Callable[[Any], Any], loss: Any, inputs: list[Tensor], mesh: Any, part: int
) -> None:
    """Bit by bit with the same gradients, and within `CLOSE` with those of a backward on parts of the batch."""
    of = torch.distributed.get_world_size()
    for name in ("muon", "sf_normuon"):
        whole, model, other = make(), make(), make()
        for m in (model, other):
            for block in blocks(m):
                fully_shard(block, mesh=mesh)
            fully_shard(m, mesh=mesh)
        # Newton-Schulz multiplies last bits by hundreds where a gradient has a small rank: conditioning has that of the
        # batch. At this rate they stay below `CLOSE`.
        theirs, ours, given = (_at(m, name, lr=1e-5) for m in (whole, model, other))
        for batch in inputs:
            theirs.zero_grad()
            ours.zero_grad()
            loss(whole, batch).backward()
            loss(model, batch.chunk(of)[part]).backward()
            give(other, {n: p.grad for n, p in whole.named_parameters() if p.grad is not None})
            for optimizer in (theirs, ours, given):
                optimizer.step()
        for optimizer in (theirs, ours, given):
            optimizer.eval()
        assert difference(whole, other) == 0.0, name
        assert difference(whole, model) <= CLOSE, (name, difference(whole, model))


def a_llama(rank: int, world: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=150,
        hidden_size=136,
        intermediate_size=270,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )

    def make() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    inputs = [torch.randint(150, (2 * world, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    _equal_to_unsharded(make, lambda m: m.model.layers, loss, inputs, mesh_of(world), rank)


def a_dit(rank: int, world: int) -> None:
    from diffusers import DiTTransformer2DModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: Any = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=34,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            dropout=0.0,
            attention_bias=False,  # a key's bias has a gradient of rounding alone, which Adam makes as large as any
        )
        return model.eval()  # its labels are dropped at random in training mode

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        at = torch.arange(len(x)) + 1
        return F.mse_loss(model(x, timestep=at * 0 + 7, class_labels=at * 0 + 3).sample, x)

    # Its last layer asks the first block's embedding, outside of that block's forward: FSDP2 has no weights there.
    inputs = [torch.randn(2 * world, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mesh = mesh_of(world) if world == 2 else init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("c", "s"))
    _equal_to_unsharded(make, lambda m: m.transformer_blocks[1:], loss, inputs, mesh, rank)


def one_program(rank: int, world: int) -> None:
    """The update of a rank's own parameters is one graph, made once; nothing that ranks send is in it."""
    whole, model = net(), sharded(net(), mesh_of(world))
    theirs = _at(whole, "normuon", mode=None, backend="aot_eager")
    ours = _at(model, "normuon", mode=None, backend="aot_eager")
    _train_on_parts(whole, theirs, model, ours, rank, world)
    assert difference(whole, model) <= CLOSE
    assert len(ours._inside.programs) == len(theirs._inside.programs) == 1


def compiled_by_inductor(rank: int, world: int) -> None:
    whole, model = net(), sharded(net(), mesh_of(world))
    theirs, ours = _at(whole, "sf_normuon", mode=None), _at(model, "sf_normuon", mode=None)
    _train_on_parts(whole, theirs, model, ours, rank, world)
    assert difference(whole, model) <= CLOSE


def _train_on_parts(whole: Any, theirs: Any, model: Any, ours: Any, rank: int, world: int) -> None:
    for x, y in batches(3, world):
        for m, o, (a, b) in ((whole, theirs, (x, y)), (model, ours, (x.chunk(world)[rank], y.chunk(world)[rank]))):
            o.zero_grad()
            loss_of(m, a, b).backward()
            o.step()


def an_optimizer_class(rank: int, world: int) -> None:
    whole, model = net(), sharded(net(), mesh_of(world))
    theirs, ours = (optim.Lion(m.parameters(), lr=1e-4, mode="eager") for m in (whole, model))
    _train_on_parts(whole, theirs, model, ours, rank, world)
    assert difference(whole, model) <= 4e-4  # a sign that rounding turns is two steps
    assert ours.param_groups[0]["steps"] == 3


def distributed_data_parallel(rank: int, world: int) -> None:
    """DDP reduces gradients into its buckets; whatever becomes of ``.grad`` after that, ranks stay equal."""
    every: list[dict[str, Any]] = [
        {"gradient_as_bucket_view": True},
        {"gradient_as_bucket_view": False},
        {"static_graph": True},
        {"find_unused_parameters": True},
    ]
    for options in every:
        whole, model = net(), net()
        ddp = DistributedDataParallel(model, **options)
        theirs, ours = _at(whole, "sf_normuon"), _at(ddp, "sf_normuon")
        for i, (x, y) in enumerate(batches(5, world)):
            accumulates = i == 2 and "static_graph" not in options
            for m, o, (a, b) in ((whole, theirs, (x, y)), (ddp, ours, (x.chunk(world)[rank], y.chunk(world)[rank]))):
                later = m.no_sync() if accumulates and m is ddp else contextlib.nullcontext()
                with later:
                    loss_of(m, a, b).backward()
                if not accumulates:
                    o.step()
                    o.zero_grad(set_to_none=bool(i % 2))
        assert all(equal_on_all(p.detach()) for p in model.parameters()), options
        assert difference(whole, model) <= CLOSE, (options, difference(whole, model))


class Branches(nn.Module):
    """One of two layers is used in a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.other = nn.Linear(16, 130), nn.Linear(130, 130), nn.Linear(130, 130)
        self.last = nn.Linear(130, 3)
        self.uses_one = True

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.one if self.uses_one else self.other)(self.first(x)))


def unused_parameters(rank: int, world: int) -> None:
    whole, model = Branches(), Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    theirs, ours = _at(whole, "normuon"), _at(ddp, "normuon")
    for i, (x, y) in enumerate(batches(4, world)):
        whole.uses_one = model.uses_one = i % 2 == 0
        for m, o, (a, b) in ((whole, theirs, (x, y)), (ddp, ours, (x.chunk(world)[rank], y.chunk(world)[rank]))):
            o.zero_grad()
            loss_of(m, a, b).backward()
            o.step()
    assert all(equal_on_all(p.detach()) for p in model.parameters())
    assert difference(whole, model) <= CLOSE


@pytest.mark.parametrize("case", [an_optimizer_class, distributed_data_parallel, unused_parameters])
def test_on_two_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(2, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", [a_llama, a_dit])
def test_models_of_libraries(case: Callable[[int, int], None], world: int) -> None:
    on_ranks(world, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [one_program, compiled_by_inductor])
def test_compiled(case: Callable[[int, int], None]) -> None:
    on_ranks(2, case)
