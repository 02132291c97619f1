"""Which parameter goes where: the rule, its exceptions, the user's overrides, and the reason given for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dit import DiT
from torch import nn

from fusion_compile import compile_training_step
from fusion_compile._state.routing import Route, SplitBlocks, route
from fusion_compile.optim._transform import Blocks

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
            self.experts = nn.Parameter(torch.zeros(4, 128, 128))
            self.out = nn.Linear(2, 2)

    model = Mixed()
    routes = routed(model)
    assert spectral(model) == {"wide.weight", "line.weight"}
    assert routes["wide.weight"].reason == "128×144 matrix (flattened convolution)"
    assert routes["narrow.weight"].reason == "a side under 128"
    assert routes["experts"].reason == "3-D and not a convolution"


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


# -- blocks -----------------------------------------------------------------------------------------------------------


class GEGLU(nn.Module):
    """diffusers' gated layer: its `proj` holds value and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 512)


class GELU(nn.Module):
    """diffusers' plain layer, under the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 512)


class AdaLayerNormZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 768)


class Conv1D(nn.Module):
    """transformers' linear layer, with its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(128, 384))


def fused() -> nn.Module:
    return nn.ModuleDict(
        {
            "qkv": nn.Linear(128, 384),
            "to_kv": nn.Linear(128, 256),
            "attn": nn.MultiheadAttention(128, 4),
            "c_attn": Conv1D(),
            "gqa": nn.ModuleDict({"qkv_proj": nn.Linear(256, 512)}),
            "gate_up_proj": nn.Linear(128, 1024),
            "net": nn.ModuleDict({"gated": GEGLU(), "plain": GELU()}),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(128, 768)),
            "norm1": AdaLayerNormZero(),
            "small": nn.ModuleDict({"qkv": nn.Linear(130, 390), "to_kv": nn.Linear(200, 200)}),
            "query_key_value": nn.Linear(128, 384),
            "linear": nn.Linear(128, 384),
            "z": nn.Linear(2, 2),
        }
    )


def split(model: nn.Module, split_blocks: SplitBlocks) -> dict[str, Route]:
    return {r.name: r for r in route(model, BOTH, split_blocks=split_blocks)}


def test_auto_cuts_what_its_name_tells_and_nothing_else() -> None:
    routes = split(fused(), "auto")
    cut = {n.removesuffix(".weight"): (r.blocks.sizes, r.blocks.axis) for n, r in routes.items() if r.blocks}
    assert cut == {
        "qkv": ((128,) * 3, -2),
        "to_kv": ((128,) * 2, -2),
        "attn.in_proj_weight": ((128,) * 3, -2),
        "c_attn": ((128,) * 3, -1),
        "gate_up_proj": ((512,) * 2, -2),
        "net.gated.proj": ((256,) * 2, -2),
        "adaLN_modulation.1": ((128,) * 6, -2),
        "norm1.linear": ((128,) * 6, -2),
        "small.qkv": ((130,) * 3, -2),
    }
    assert routes["qkv.weight"].reason == "384×128 matrix in 3 row blocks of 128"
    assert routes["c_attn.weight"].reason == "128×384 matrix in 3 column blocks of 128"
    assert routes["gqa.qkv_proj.weight"].reason == (
        "512×256 matrix; q, k and v of unknown sizes, not cut: name them in split_blocks"
    )
    assert routes["small.to_kv.weight"].reason == ("200×200 matrix; not in 2 row blocks of 100: a side under 128")
    assert routes["qkv.bias"] == Route("qkv.bias", (384,), "scalar", "1-D")


def test_auto_leaves_the_roles_alone_and_an_elementwise_optimizer_as_it_is() -> None:
    model = fused()
    assert {n: r.role for n, r in split(model, "auto").items()} == {n: r.role for n, r in split(model, None).items()}
    assert route(model, ("scalar",), split_blocks="auto") == route(model, ("scalar",))
    assert all(r.blocks is None for r in split(model, None).values())


def test_the_blocks_of_a_dit() -> None:
    model = DiT(input_size=32, patch_size=8, in_channels=4, hidden_size=128, depth=1)
    cut = {n: r.blocks for n, r in split(model, "auto").items() if r.blocks}
    assert cut == {
        "blocks.0.attn.qkv.weight": Blocks((128,) * 3),
        "blocks.0.adaLN_modulation.1.weight": Blocks((128,) * 6),
        "final_layer.adaLN_modulation.1.weight": Blocks((128,) * 2),
    }


@pytest.mark.parametrize(
    ("spec", "blocks", "words"),
    [
        (4, Blocks((128,) * 4), "in 4 row blocks of 128"),
        ((256, 128, 128), Blocks((256, 128, 128)), "in row blocks of 256+128+128"),
        ([256, 256], Blocks((256, 256)), "in 2 row blocks of 256"),
        (("rows", 2), Blocks((256, 256)), "in 2 row blocks of 256"),
        (("columns", 2), Blocks((128, 128), -1), "in 2 column blocks of 128"),
        (("columns", (128, 128)), Blocks((128, 128), -1), "in 2 column blocks of 128"),
        (1, None, ""),
        ((512,), None, ""),
    ],
)
def test_a_matrix_is_cut_as_told(spec: Any, blocks: Blocks | None, words: str) -> None:
    found = split(fused(), {r"gqa\.": spec})["gqa.qkv_proj.weight"]
    assert found.blocks == blocks
    assert found.reason == f"512×256 matrix {words}".rstrip()


def test_a_pattern_that_also_matches_biases_cuts_the_matrices() -> None:
    routes = split(fused(), {r"^qkv": 3, r"^qkv\.w": 3})  # and two that agree are one
    assert routes["qkv.weight"].blocks == Blocks((128,) * 3)
    assert routes["qkv.bias"].blocks is None


def test_a_flattened_convolution_is_cut_by_its_channels() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(32, 256, 3), "z": nn.Linear(2, 2)})
    assert split(model, {"conv": 2})["conv.weight"].reason == (
        "256×288 matrix (flattened convolution) in 2 row blocks of 128"
    )


@pytest.mark.parametrize(
    ("split_blocks", "words"),
    [
        ("Auto", r"split_blocks='Auto' is not known; give 'auto' or"),
        ({"qvk": 3}, r"split_blocks: 'qvk' matches no trainable parameter; the names look like qkv\.weight"),
        ({r"qkv\.bias": 3}, r"'qkv\\\\.bias' matches no matrix on the spectral path; qkv\.bias \[384\].*\(1-D\)"),
        ({r"^z": 2}, r"'\^z' matches no matrix on the spectral path; z\.weight \[2, 2\].*\(output head\)"),
        ({"gqa": 3}, r"'gqa': the 512 rows of gqa\.qkv_proj\.weight are not 3 equal blocks"),
        ({"gqa": (256, 128)}, r"'gqa': 256\+128 is 384, but gqa\.qkv_proj\.weight has 512 rows"),
        ({"gqa": ("columns", (128, 256))}, r"128\+256 is 384, but gqa\.qkv_proj\.weight has 256 columns"),
        (
            {"gqa": 8},
            r"gqa\.qkv_proj\.weight \[512, 256\] in 8 row blocks of 64 has a block with a side of 64.*at least 128",
        ),
        ({"gqa": (384, 64, 64)}, r"row blocks of 384\+64\+64 has a block with a side of 64"),
        ({"gqa": "three"}, r"'gqa': 'three' is neither a number of blocks nor a tuple of their sizes; give 3,"),
        ({"gqa": True}, r"True is neither a number of blocks"),
        ({"gqa": (512, 0)}, r"\(512, 0\) is neither a number of blocks"),
        ({"gqa": ("diagonal", 2)}, r"\('diagonal', 2\) is neither a number of blocks"),
        ({"gqa": 2, r"qkv_proj": 4}, r"gqa\.qkv_proj\.weight matches 'gqa' and 'qkv_proj'; keep one"),
    ],
)
def test_blocks_that_cannot_be_are_refused(split_blocks: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split(fused(), split_blocks)


def test_blocks_are_refused_by_an_elementwise_optimizer() -> None:
    with pytest.raises(ValueError, match=r"split_blocks=\{'qkv': 3\} has no effect.*element by element"):
        route(fused(), ("scalar",), split_blocks={"qkv": 3})
