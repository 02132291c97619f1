"""Parameters that are stacks of matrices: experts ``[E, m, n]`` and heads are orthogonalized matrix by matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._state.banks import build_layout
from fusion_compile._state.routing import Route, route
from tests.small_models import compiled

BOTH = ("spectral", "scalar")


class Mlp(nn.Module):
    """The names and shapes of transformers' fused experts."""

    def __init__(self, experts: int, wide: int, narrow: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * narrow, wide) / wide**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, wide, narrow) / narrow**0.5)


class Mixture(nn.Module):
    def __init__(self, experts: int = 3, wide: int = 128, narrow: int = 128) -> None:
        super().__init__()
        self.router = nn.Linear(wide, experts)
        self.experts = Mlp(experts, wide, narrow)
        self.norm = nn.LayerNorm(wide)


def routed(model: nn.Module, **options: list[str]) -> dict[str, Route]:
    return {r.name: r for r in route(model, BOTH, options.get("force_scalar", ()), options.get("force_spectral", ()))}


def test_experts_are_stacks_by_default_and_their_reason_says_so() -> None:
    routes = routed(Mixture())
    up, down = routes["experts.gate_up_proj"], routes["experts.down_proj"]
    assert (up.role, up.stack, up.matrix) == ("spectral", True, (256, 128))
    assert up.reason == "a stack of 3 matrices of 256×128"
    assert (down.matrix, down.role) == ((128, 128), "spectral")
    assert routes["router.weight"].role == "scalar"
    narrow = routed(Mixture(narrow=64))
    assert narrow["experts.gate_up_proj"].role == "spectral"  # 128×128 each
    assert narrow["experts.down_proj"].reason == "a side under 128"


def test_other_stacks_are_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Parameter(torch.randn(4, 128, 160))
            self.layers_and_heads = nn.Parameter(torch.randn(2, 4, 128, 160))
            self.kernel = nn.Parameter(torch.randn(16, 8, 3, 3))  # of F.conv2d, in a module of one's own
            self.ranks = nn.Parameter(torch.randn(16, 8, 3))
            self.patches = nn.Parameter(torch.randn(64, 3, 16, 16))

    plain = routed(Attention())
    assert {r.reason for r in plain.values()} == {"3-D and not a convolution", "4-D and not a convolution"}
    forced = routed(Attention(), force_spectral=["."])
    assert forced["heads"].reason == "force_spectral '.'; a stack of 4 matrices of 128×160"
    assert forced["layers_and_heads"].reason == "force_spectral '.'; a stack of 8 matrices of 128×160"
    assert forced["ranks"].reason == "force_spectral '.'; a stack of 16 matrices of 8×3"
    assert {n: r.matrix for n, r in forced.items() if not r.stack} == {"kernel": (16, 72), "patches": (64, 768)}
    assert forced["kernel"].reason == "force_spectral '.'; flattened, as a convolution's weight is"


def test_what_belongs_to_a_convolution_of_ones_own_is_flattened() -> None:
    class CausalConv1d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8, 64))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = CausalConv1d()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 16, 3))

    forced = routed(Both(), force_spectral=[r"weight$|original1"])
    assert {n: r.matrix for n, r in forced.items() if r.role == "spectral"} == {
        "own.weight": (16, 512),
        "normed.parametrizations.weight.original1": (16, 24),
    }
    assert {r.stack for r in forced.values()} == {False}


def test_a_stack_lies_in_one_bank_with_other_matrices_and_comes_back_in_its_shape() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 6, bias=False)
            self.stack = nn.Parameter(torch.randn(3, 6, 8))
            self.alone = nn.Parameter(torch.randn(1, 6, 8))
            self.two = nn.Linear(8, 6, bias=False)

    model = Both()
    layout = build_layout(model, route(model, BOTH, (), ["."]))
    (bank,) = layout.banks
    assert (bank.shape, bank.matrices) == ((6, 6, 8), [3, 1, 1, 1])
    named = {n: p.detach() for n, p in model.named_parameters()}
    joined = layout.join(named)[bank.key]
    back = layout.views({bank.key: joined})
    assert all(torch.equal(back[n], p) and back[n].shape == p.shape for n, p in named.items())
    narrow = dict(layout.by_name(bank.key, joined[:, :, :1]))  # a state with shorter axes, a norm for each row
    assert (narrow["stack"].shape, narrow["one.weight"].shape) == ((3, 6, 1), (6, 1))
    assert [(p.name, p.shape, p.at) for p in layout.infos[bank.key].places] == [
        ("stack[0]", (6, 8), 0),
        ("stack[1]", (6, 8), 1),
        ("stack[2]", (6, 8), 2),
        ("alone", (1, 6, 8), 3),
        ("one.weight", (6, 8), 4),
        ("two.weight", (6, 8), 5),
    ]


class Stacked(nn.Module):
    """One parameter for all experts."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.experts = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.experts)


class Apart(nn.Module):
    """The same experts as parameters of their own, which torch.optim.Muon takes."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.experts = nn.ParameterList([nn.Parameter(matrix.clone()) for matrix in start])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, matrix) for matrix in self.experts], dim=1)


@pytest.mark.parametrize("program", [{"mode": "eager"}, {"backend": "aot_eager"}], ids=["eager", "captured"])
def test_each_expert_is_updated_as_torchs_muon_updates_it(program: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 6, 4)
    mine, reference = Stacked(start), Apart(start)
    recipe = optim.muon(lr=0.02, weight_decay=0.1, matmul_dtype=torch.bfloat16)  # torch.optim.Muon's
    step = compiled(mine, lambda m, x, y: F.mse_loss(m(x), y), optimizer=recipe, force_spectral=["experts"], **program)
    optimizer = torch.optim.Muon(reference.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(4):
        x, y = torch.randn(8, 4), torch.randn(8, 3, 6)
        step(x, y)
        optimizer.zero_grad()
        F.mse_loss(reference(x), y).backward()
        optimizer.step()
    wanted = torch.stack([matrix.detach() for matrix in reference.experts])
    # Four updates of singular values of 0.02 √(6/4), and 3 % for bf16's rounding in each orthogonalization.
    torch.testing.assert_close(mine.experts.detach(), wanted, rtol=0, atol=4 * 0.02 * 1.5**0.5 * 0.03)
    # As one 3 × 24 matrix, as before, the update would be another by far more than that.
    assert float((wanted - start).abs().max()) > 0.03


@pytest.mark.parametrize("recipe", ["sf_normuon", "soap", "full_fusion"])
def test_stacks_are_updated_as_their_matrices_by_every_recipe(recipe: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 4, 4)  # square: SOAP's basis of a null space is arbitrary
    results = []
    for kind in (Stacked, Apart):
        torch.manual_seed(1)
        model = kind(start)
        step = fc.compile_training_step(
            model, lambda m, x, y: F.mse_loss(m(x), y), optimizer=recipe, force_spectral=["experts"], mode="eager"
        )
        for _ in range(4):
            step(torch.randn(8, 4), torch.randn(8, 3, 4))
        results.append(torch.stack(list(model.experts)).detach())
    # The same batched products; the gradients are summed by another einsum, and bf16 products turn its last bit.
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-3)


def test_stacks_are_cut_into_blocks_and_saved_by_name(tmp_path: Any) -> None:
    model = Mixture(narrow=128)
    options: dict[str, Any] = {"optimizer": "sf_normuon", "mode": "eager"}

    def loss(m: Mixture, x: Tensor) -> Tensor:
        up, gate = torch.einsum("bi,eoi->beo", m.norm(x), m.experts.gate_up_proj).chunk(2, -1)
        out = torch.einsum("bei,eoi->beo", up * gate.sigmoid(), m.experts.down_proj)
        return ((out * m.router(x).softmax(-1)[..., None]).sum(1) - x).square().mean()

    step = fc.compile_training_step(model, loss, split_blocks={"gate_up": 2}, **options)
    assert {r.name: r.reason for r in step.routes}["experts.gate_up_proj"].endswith("in 2 row blocks of 128")
    step(torch.randn(4, 128))
    step.save(tmp_path / "ck")
    saved = step.state_dict()["optimizer"]
    moments = {n: t.shape for n, t in saved.items() if n.endswith("experts.gate_up_proj")}
    assert (3, 256, 128) in moments.values() and all(shape[0] == 3 for shape in moments.values())
    other = fc.compile_training_step(Mixture(narrow=128), loss, split_blocks={"gate_up": 2}, **options)
    other.load(tmp_path / "ck")
    x = torch.randn(4, 128)
    assert torch.equal(step(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.model.parameters(), strict=True))
    assert "a stack of 3 matrices of 128×128" in str(step.explain())


def test_the_torch_optimizer_leaves_a_stack_without_gradient_alone() -> None:
    used, idle = Stacked(torch.randn(2, 6, 4)), Stacked(torch.randn(3, 6, 4))
    model = nn.ModuleDict({"used": used, "idle": idle})
    optimizer = optim.as_torch_optimizer(model, "muon", mode="eager", force_spectral=["experts"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    used(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    assert torch.equal(idle.experts, before["idle.experts"])
    assert not torch.equal(used.experts, before["used.experts"])
