"""Which parameter goes where: the rule, its exceptions, the user's overrides, and the reason given for each."""

from __future__ import annotations

import pytest
import torch
from dit import DiT
from torch import nn

from fusion_compile import compile_training_step
from fusion_compile._state.routing import Route, route

BOTH = ("spectral", "scalar")


def routed(model: nn.Module, **options: list[str]) -> dict[str, Route]:
    return {r.name: r for r in route(model, BOTH, options.get("force_scalar", ()), options.get("force_spectral", ()))}


def spectral(model: nn.Module, **options: list[str]) -> set[str]:
    return {name for name, r in routed(model, **options).items() if r.role == "spectral"}


class NanoGPT(nn.Module):
    """The names and the tying of nanoGPT."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(256, 128),
                "h": nn.ModuleList(
                    nn.ModuleDict({"mlp": nn.Linear(128, 512), "head": nn.Linear(512, 128)}) for _ in range(2)
                ),
            }
        )
        self.lm_head = nn.Linear(128, 256, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_lm_head_are_scalar_while_blocks_are_spectral(tied: bool) -> None:
    model = NanoGPT(tied)
    routes = routed(model)
    hidden = {f"transformer.h.{i}.{part}.weight" for i in range(2) for part in ("mlp", "head")}
    assert spectral(model) == hidden  # `head` inside a block is one of many, not the output
    assert routes["transformer.wte.weight"].reason == "embedding"
    assert ("lm_head.weight" in routes) != tied
    if not tied:
        assert routes["lm_head.weight"].reason == "output head"
    assert routes["transformer.h.0.mlp.bias"] == Route("transformer.h.0.mlp.bias", (512,), "scalar", "1-D")


def test_a_head_tied_to_a_hidden_matrix_is_scalar_under_the_first_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.ReLU(), nn.Linear(128, 128, bias=False))
    assert spectral(model) == {"0.weight"}
    model[2].weight = model[0].weight
    assert routed(model) == {"0.weight": Route("0.weight", (128, 128), "scalar", "output head")}


def test_the_final_layer_of_a_dit_is_scalar_and_its_modulation_is_not() -> None:
    model = DiT(input_size=32, patch_size=8, in_channels=4, hidden_size=128, depth=1)
    routes = routed(model)
    assert min(routes["final_layer.linear.weight"].shape) >= 128
    assert routes["final_layer.linear.weight"].reason == "output head"
    assert routes["final_layer.adaLN_modulation.1.weight"].role == "spectral"
    assert routes["blocks.0.attn.qkv.weight"].reason == "384×128 matrix"
    assert routes["y_embedder.embedding_table.weight"].role == "scalar"
    assert routes["x_embedder.weight"].reason == "128×256 matrix (flattened convolution)"


@pytest.mark.parametrize("nested", [False, True])
def test_the_last_linear_of_a_sequential_is_the_head(nested: bool) -> None:
    tail = [nn.ReLU(), nn.Linear(128, 128)]
    model = nn.Sequential(nn.Linear(128, 128), *([nn.Sequential(*tail)] if nested else tail))
    head = "1.1.weight" if nested else "2.weight"
    assert spectral(model) == {"0.weight"}
    assert routed(model)[head].reason == "output head"


def test_the_last_block_of_a_module_list_is_not_a_head() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(2))

    assert spectral(Tower()) == {"layers.0.weight", "layers.1.weight"}


def test_convolutions_are_flattened_to_first_times_rest_and_other_tensors_are_not() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(16, 128, 3)  # 128 x 144
            self.narrow = nn.Conv2d(14, 128, 3)  # 128 x 126
            self.line = nn.Conv1d(64, 128, 2)  # 128 x 128
            self.heads_of = nn.Parameter(torch.zeros(4, 128, 128))
            self.out = nn.Linear(2, 2)

    model = Mixed()
    routes = routed(model)
    assert spectral(model) == {"wide.weight", "line.weight"}
    assert routes["wide.weight"].reason == "128×144 matrix (flattened convolution)"
    assert routes["narrow.weight"].reason == "a side under 128"
    assert routes["heads_of"].reason == "3-D and not a convolution"


@pytest.mark.parametrize(
    ("rows", "columns", "role"), [(128, 128, "spectral"), (127, 512, "scalar"), (512, 127, "scalar")]
)
def test_both_sides_must_reach_128(rows: int, columns: int, role: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(columns, rows), "z": nn.Linear(2, 2)})
    assert routed(model)["a.weight"].role == role


def test_frozen_parameters_are_left_out_and_tied_ones_counted_once() -> None:
    model = nn.ModuleDict({k: nn.Linear(128, 128) for k in ("a", "b", "c")})
    model["a"].weight.requires_grad_(False)
    model["c"].weight = model["b"].weight
    assert list(routed(model)) == ["a.bias", "b.weight", "b.bias", "c.bias"]


def test_an_elementwise_optimizer_takes_everything_and_says_why() -> None:
    model = nn.Linear(128, 128)
    assert {(r.role, r.reason) for r in route(model, ("scalar",))} == {("scalar", "the recipe is elementwise")}


# -- overrides --------------------------------------------------------------------------------------------------------


def small_tower() -> nn.Module:
    return nn.ModuleDict(
        {"emb": nn.Embedding(9, 5), "hidden": nn.Linear(128, 128), "tiny": nn.Linear(4, 3), "z": nn.Linear(2, 2)}
    )


def test_force_scalar_and_force_spectral_override_the_rule_and_are_named_in_the_reason() -> None:
    routes = routed(small_tower(), force_scalar=["hidden"], force_spectral=[r"^emb\.", r"tiny\.weight$"])
    assert (routes["hidden.weight"].role, routes["hidden.weight"].reason) == ("scalar", "force_scalar 'hidden'")
    assert (routes["emb.weight"].role, routes["emb.weight"].reason) == ("spectral", r"force_spectral '^emb\\.'")
    assert routes["tiny.weight"].role == "spectral"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"force_scalar": ["hidden"], "force_spectral": ["weight"]}, ValueError, r"hidden\.weight matches both"),
        ({"force_scalar": ["hiden"]}, ValueError, r"force_scalar: 'hiden' matches no trainable parameter.*emb\.weight"),
        ({"force_spectral": ["nothing"]}, ValueError, "force_spectral: 'nothing' matches no trainable"),
        ({"force_spectral": [r"hidden\.bias"]}, ValueError, r"hidden\.bias of shape \(128,\) is not a matrix"),
        ({"force_scalar": "hidden"}, TypeError, r"is a string; give a list"),
    ],
)
def test_an_override_that_cannot_be_kept_is_refused(
    options: dict[str, list[str]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        routed(small_tower(), **options)


def test_force_spectral_is_refused_by_an_elementwise_optimizer() -> None:
    model = small_tower()
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"force_spectral=\['hidden'\] has no effect.*sf_normuon"):
        compile_training_step(model, lambda m, x: x.sum(), optimizer="adamw", force_spectral=[r"hidden"], mode="eager")
    assert before == {n: p.data_ptr() for n, p in model.named_parameters()}
