"""Blocks of a fused matrix move as the same blocks would as parameters of their own (CMuon)."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile import compile_training_step, optim
from fusion_compile._state.banks import build_layout
from fusion_compile._state.blocks import BlockSpec, cut_blocks
from fusion_compile._state.flat_tree import flatten, form, unflatten
from fusion_compile._state.named_state import named_state
from fusion_compile._state.routing import route
from fusion_compile._types import Tensors
from fusion_compile.optim import Transform
from fusion_compile.optim._transform import BankInfo, Blocks, bound
from tests.optim.walks import Walk, distance, numbers
from tests.oracles.cmuon import CMuon
from tests.oracles.muon import Muon
from tests.oracles.newton_schulz import JORDAN
from tests.oracles.normuon import NorMuon
from tests.oracles.protocol import Oracle
from tests.oracles.protocol import Tensors as Arrays

KEY = "spectral/whole"


BLOCKS = {
    "equal": Blocks((16, 16, 16)),
    "grouped queries": Blocks((32, 8, 8)),
    "same sizes apart": Blocks((8, 32, 8)),
    "all different": Blocks((8, 24, 16)),
    "columns": Blocks((20, 20), -1),
    "unequal columns": Blocks((8, 24, 8), -1),
}


ROWS, COLUMNS = 48, 40


def muon(matmul_dtype: torch.dtype, adjust_lr: str = "original") -> Transform:
    return optim.chain(
        optim.orthogonalize(0.9, matmul_dtype=matmul_dtype, gram_restarts="auto"),
        optim.scale_by_shape(adjust_lr),
        optim.add_decayed_weights(0.1),
        optim.scale_by_learning_rate(0.02),
    )


def normuon(matmul_dtype: torch.dtype, scale: str = "preserve_norm") -> Transform:
    return optim.chain(
        optim.orthogonalize(0.9, matmul_dtype=matmul_dtype, gram_restarts="auto"),
        optim.normalize_neurons(0.9, scale=scale),
        optim.scale_by_shape("original" if scale == "preserve_norm" else "none"),
        optim.add_decayed_weights(0.1),
        optim.scale_by_learning_rate(0.02),
    )


CHAINS: dict[str, Callable[[torch.dtype], Transform]] = {
    "muon": muon,
    "muon in AdamW's unit": lambda d: muon(d, "match_rms_adamw"),
    "normuon": normuon,
    "normuon in AdamW's unit": lambda d: normuon(d, "match_rms"),
}


def cut(tensors: Tensors, blocks: Blocks) -> Tensors:
    return {
        f"{key}#{i}": part.clone()
        for key, t in tensors.items()
        for i, part in enumerate(torch.split(t, list(blocks.sizes), blocks.axis))
    }


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_blocks_move_as_parameters_of_their_own(chain: str, kind: str, lead: tuple[int, ...]) -> None:
    blocks, make = BLOCKS[kind], CHAINS[chain]
    torch.manual_seed(0)
    params = {KEY: torch.randn(*lead, ROWS, COLUMNS, dtype=torch.float64)}
    transform = make(torch.float64)
    whole = Walk(bound(transform, {KEY: BankInfo((), blocks)}), params)
    apart, uncut = Walk(transform, cut(params, blocks)), Walk(transform, params)
    for _ in range(5):
        g = {KEY: torch.randn_like(params[KEY])}
        moved = whole(g)
        alone = apart(cut(g, blocks))
        for key, part in cut(moved, blocks).items():
            # fp64 rounds at 1e-16, Newton-Schulz grows what is small by up to 500, and other batches are summed in
            # other orders.
            torch.testing.assert_close(part, alone[key], rtol=1e-12, atol=1e-14)
        assert float((moved[KEY] - uncut(g)[KEY]).norm()) > 0.1 * float(moved[KEY].norm())


@pytest.mark.parametrize("chain", CHAINS)
def test_a_bank_without_blocks_moves_bit_by_bit_as_before(chain: str) -> None:
    transform = CHAINS[chain](torch.float32)
    params = {KEY: torch.randn(2, 12, 20)}
    facts = {KEY: BankInfo((), None)}
    first, second = Walk(transform, params), Walk(bound(transform, facts), params)
    for _ in range(2):
        g = {KEY: torch.randn(2, 12, 20)}
        assert torch.equal(first(g)[KEY], second(g)[KEY])


TWINS: dict[str, tuple[Callable[[torch.dtype], Transform], Callable[[Arrays, Collection[str]], Oracle]]] = {
    "muon": (
        lambda d: optim.chain(
            optim.orthogonalize(0.95, matmul_dtype=d), optim.scale_by_shape(), optim.scale_by_learning_rate(0.02)
        ),
        lambda p, s: Muon(p, spectral=s, lr=0.02),
    ),
    "normuon": (
        lambda d: optim.chain(
            optim.orthogonalize(0.95, matmul_dtype=d),
            optim.normalize_neurons(0.95),
            optim.scale_by_shape(),
            optim.scale_by_learning_rate(0.02),
        ),
        lambda p, s: NorMuon(p, spectral=s, lr=0.02, coefficients=JORDAN),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TWINS)
def test_the_chains_follow_their_twin_of_separate_arrays(name: str, dtype: torch.dtype) -> None:
    make, twin = TWINS[name]
    names = ("tall", "wide", "square")
    cuts = {"tall": ((96, 48, 48), 0), "wide": ((80, 80), 1)}  # 192×128 and 128×160
    facts = {n: BankInfo((), Blocks(sizes, axis - 2)) for n, (sizes, axis) in cuts.items()}
    far = distance(
        bound(make(dtype), facts),
        lambda start: CMuon(start, spectral=names, blocks=cuts, make=twin),
        dtype,
        names,
    )
    # Seen: 1e-15 and 3e-7. fp32 rounds at 6e-8; the Bowl's momenta are well-conditioned, so little of it grows, and 100
    # steps average it.
    assert far < (1e-13 if dtype == torch.float64 else 3e-6)


def calls_in_the_update(k: int, blocks: Blocks) -> int:
    transform = bound(normuon(torch.bfloat16), {KEY: BankInfo((), blocks)})
    params = {KEY: torch.empty(k, ROWS, COLUMNS, device="meta")}
    state = transform.init(params)
    shape = form(state)
    h = {n: torch.empty((), device="meta") for n in transform.hyperparameters}

    def update(g: Tensors, s: Tensors, h: Tensors) -> tuple[Tensors, Tensors]:
        updates, after = transform.update(g, unflatten(shape, s), g, optim.Context(h))
        return updates, dict(flatten(after))

    graph = make_fx(update)(dict(params), dict(flatten(state)), h).graph
    return sum(node.op == "call_function" for node in graph.nodes)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_update_has_as_many_nodes_for_64_matrices_as_for_2(kind: str) -> None:
    assert calls_in_the_update(2, BLOCKS[kind]) == calls_in_the_update(64, BLOCKS[kind]) > 10


@pytest.mark.parametrize("kind", ["same sizes apart", "unequal columns"])
def test_dynamo_captures_blocks_in_one_graph(kind: str) -> None:
    transform = bound(normuon(torch.float32), {KEY: BankInfo((), BLOCKS[kind])})
    params = {KEY: torch.randn(2, ROWS, COLUMNS)}
    state, context = transform.init(params), numbers(transform, torch.float32)
    compiled = torch.compile(transform.update, fullgraph=True, backend="aot_eager")
    found, wanted = (u(params, state, params, context)[0][KEY] for u in (compiled, transform.update))
    torch.testing.assert_close(found, wanted)


def test_sqrt_blocks_multiplies_by_the_root_of_their_number() -> None:
    facts = {KEY: BankInfo((), Blocks((32, 8, 8)))}
    u = {KEY: torch.ones(2, ROWS, 8, dtype=torch.float64)}
    plain, scaled = (Walk(bound(optim.scale_by_shape(sqrt_blocks=s), facts), u)(u)[KEY] for s in (False, True))
    torch.testing.assert_close(plain[0, :, 0], torch.tensor([2.0] * 32 + [1.0] * 16, dtype=torch.float64))
    torch.testing.assert_close(scaled, 3**0.5 * plain)
    uncut = Walk(optim.scale_by_shape(sqrt_blocks=True), u)(u)[KEY]
    torch.testing.assert_close(uncut, 6**0.5 * u[KEY])  # √(48/8), and no blocks


class Attention(nn.Module):
    """Two layers with one weight for q, k and v, and one that is cut by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 384) for _ in range(2))
        self.out = nn.Linear(256, 128)
        self.last = nn.Linear(2, 2)


SPLIT: dict[str, BlockSpec] = {r"layers": 3, r"out": ("columns", 2)}


def test_states_of_cut_banks_go_by_their_parameters_names() -> None:
    model = Attention()
    whole = route(model, ("spectral", "scalar"))
    routes = {split: cut_blocks(whole, model, SPLIT if split else None) for split in (0, 1)}
    layouts = {split: build_layout(model, r) for split, r in routes.items()}
    assert [b.key for b in layouts[0].banks if b.matrix] == ["spectral/384x128/float32", "spectral/128x256/float32"]
    rows, columns = (b.key for b in layouts[1].banks if b.matrix)
    assert rows == "spectral/384x128/rows128+128+128/float32"
    assert columns == "spectral/128x256/columns128+128/float32"
    facts = layouts[1].infos
    assert facts[rows].blocks == Blocks((128, 128, 128)) and facts[columns].blocks == Blocks((128, 128), -1)
    assert [(m.name, m.shape, m.at) for m in facts[rows].places] == [
        ("layers.0.weight", (384, 128), 0),
        ("layers.1.weight", (384, 128), 1),
    ]
    states = {}
    for split, layout in layouts.items():
        transform = bound(optim.sf_normuon(matmul_dtype=torch.float32), layout.infos)
        banks = layout.join({n: p.detach() for n, p in model.named_parameters()})
        _, state = transform.update(banks, transform.init(banks), banks, numbers(transform, torch.float32))
        flat = dict(flatten(state, "optimizer"))
        states[split] = named_state(layout, flat)
        if split:
            nu = {b: next(t for path, t in flat.items() if path.endswith(f"nu/{b}")) for b in (rows, columns)}
            assert nu[rows].shape == (2, 384, 1) and nu[columns].shape == (1, 128, 2)
            assert [n for n, _ in layout.by_name(rows, nu[rows])] == ["layers.0.weight", "layers.1.weight"]
    assert set(states[0]) == set(states[1])
    differing = {n.split(".")[-3] for n, t in states[1].items() if t.shape != states[0][n].shape}
    assert differing == {"nu"}  # one number a row and block of columns


class Fused(nn.Module):
    """q, k and v in one weight, or in three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        weight = torch.randn(384, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.qkv = nn.ParameterList(nn.Parameter(w.clone()) for w in ([weight] if fused else weight.split(128)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x @ w.T for w in self.qkv], -1).square().mean()


def test_a_model_with_a_fused_weight_trains_as_one_with_three() -> None:
    """Routing, layout, facts and transform together: 1e-11 in fp64, three steps of what the first test here bounds."""
    weights = []
    for fused in (True, False):
        model = Fused(fused)
        layout = build_layout(model, cut_blocks(route(model, ("spectral",)), model, {"qkv": 3 if fused else 1}))
        walk = Walk(
            bound(normuon(torch.float64), layout.infos),
            layout.join({n: p.detach() for n, p in model.named_parameters()}),
        )
        for seed in range(3):
            x = torch.randn(16, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            grads = torch.autograd.grad(model(x), list(model.parameters()))
            walk(layout.join(dict(zip(dict(model.named_parameters()), grads, strict=True))))
            with torch.no_grad():
                for n, v in layout.views(walk.params).items():
                    model.get_parameter(n).copy_(v)
        weights.append(torch.cat([w.detach() for w in model.qkv]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-11, atol=1e-11)


def test_banks_without_blocks_keep_their_keys_in_a_step() -> None:
    step = compile_training_step(Attention(), lambda m, x: m.out(x).sum(), mode="eager")
    assert [b.key for b in step.layout.banks] == [
        "spectral/384x128/float32",
        "scalar/float32",
        "spectral/128x256/float32",
    ]
