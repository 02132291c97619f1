"""How fused matrices are cut: what ``"auto"`` recognizes, what a specification means, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dit import DiT
from torch import nn

from fusion_compile._state.blocks import SplitBlocks, cut_blocks
from fusion_compile._state.routing import Route, route
from fusion_compile.optim._transform import Blocks

BOTH = ("spectral", "scalar")


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
    return {r.name: r for r in cut_blocks(route(model, BOTH), model, split_blocks)}


def test_auto_cuts_the_matrices_that_it_knows_by_name_and_no_others() -> None:
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
    elementwise = route(model, ("scalar",))
    assert cut_blocks(elementwise, model, "auto") == elementwise
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
def test_a_matrix_is_cut_as_specified(spec: Any, blocks: Blocks | None, words: str) -> None:
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
        cut_blocks(route(fused(), ("scalar",)), fused(), {"qkv": 3})
