"""explain-sampler: a report from a configuration alone, and a sentence for everything that can be missing."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dit import DiT
from torch import Tensor, nn

from fusion_compile._sampler.without_weights.command import add_explain_sampler, explain_sampler
from fusion_compile._sampler.without_weights.diffusers_arguments import CallSizes
from fusion_compile._sampler.without_weights.diffusers_calls import model_of_class
from fusion_compile._sampler.without_weights.target import build_target
from tests.models.tiny import TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in version:FutureWarning")


def dit_factory() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of 5 M parameters for one call, in training mode as a fresh module is."""
    return DiT(hidden_size=256, depth=4), (torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64))


def dit_factory_with_names() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    model, (x, t, y) = dit_factory()
    return model, (x,), {"t": t, "y": y}


def bare_factory() -> nn.Module:
    return DiT()


def wrong_factory() -> tuple[nn.Module, int]:
    return DiT(), 3


NOT_A_FACTORY = 3


def config_file(folder: Path, name: str, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({"_class_name": TINY[name].class_name, **TINY[name].config, **changes}))
    return file


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_explain_sampler(parser.add_subparsers(required=True))
    args = parser.parse_args(["explain-sampler", *arguments])
    status: int = args.run(args)
    return status


def test_a_configuration_is_explained_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file(tmp_path, "CogView4")
    assert run(str(tmp_path), "--steps", "10", "--text", "6") == 0
    text = capsys.readouterr().out
    assert "sampler of CogView4Transformer2DModel, 10 steps" in text
    assert "hidden_states=live (guessed)" in text and "timestep=step (guessed)" in text
    assert "bfloat16[2, 4, 8, 8] meta" in text
    assert "declined" in text and "MiB for one request" in text
    with torch.device("meta"):
        model, _, arguments = build_target(str(tmp_path), None, CallSizes(batch=3, height=4, text=6))
    assert {t.device.type for t in model.parameters()} == {"meta"}
    assert arguments["hidden_states"].shape == (3, 4, 4, 4) and arguments["encoder_hidden_states"].shape == (3, 6, 12)


def test_weights_are_counted_once_each_and_in_their_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config_file(tmp_path, "DiT")
    assert run(str(file), "--json", "--dtype", "float32") == 0
    found = json.loads(capsys.readouterr().out)
    weights = found["weights"]
    model = model_of_class(TINY["DiT"].class_name, TINY["DiT"].config)
    counted = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert sum(count for count, _ in weights.values()) == sum(found["report"]["parameters"].values()) == counted
    assert weights["step"][0] > weights["step_request"][0] > 0 == weights["unread"][0]
    assert all(size == 4 * count for count, size in weights.values())


def test_modules_that_a_class_keeps_in_float32_stay_so(tmp_path: Path) -> None:
    model, _, _ = build_target(str(config_file(tmp_path, "Wan")), None, TINY["Wan"].sizes)
    assert "hidden_states bfloat16[2, 4, 2, 8, 8]" in explain_sampler(str(tmp_path), sizes=TINY["Wan"].sizes)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["scale_shift_table"] == torch.float32 and kinds["proj_out.weight"] == torch.bfloat16


@pytest.mark.parametrize("factory", ["dit_factory", "dit_factory_with_names"])
def test_a_factory_is_explained(factory: str) -> None:
    text = explain_sampler(f"{__name__}:{factory}", n_steps=20, dtype=torch.bfloat16)
    assert "sampler of DiT, 20 steps" in text and "y=request (guessed)" in text
    assert "step_request" in text and "by what the timestep and the request decide" in text


def test_roles_budget_and_batched_rows_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    target = f"{__name__}:dit_factory"
    assert run(target, "--roles", "y=live", "--byte-budget", "0.001", "--batched") == 0
    text = capsys.readouterr().out
    assert "y=live" in text and "y=live (guessed)" not in text
    assert "batched" in text and "budget 0.00 MiB" in text and "Raise byte_budget to keep it." in text


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("nowhere/config.json", "there is no nowhere/config.json"),
        ("no_such_module:factory", "module 'no_such_module' cannot be imported"),
        (f"{__name__}:no_such_factory", "has no function 'no_such_factory'"),
        (f"{__name__}:NOT_A_FACTORY", "has no function 'NOT_A_FACTORY'"),
        (f"{__name__}:wrong_factory", r"returned \(DiT, int\); it must return"),
        (f"{__name__}:bare_factory", "no example call is known for DiT; known are AuraFlow"),
    ],
)
def test_what_is_missing_is_said(target: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        explain_sampler(target)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no _class_name"),
        ('{"_class_name": "NoSuchTransformer"}', "has no model class 'NoSuchTransformer'"),
        ('{"_class_name": "DDIMScheduler"}', "has no model class 'DDIMScheduler'"),
    ],
)
def test_a_file_that_is_no_model_is_said(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        explain_sampler(str(tmp_path))


def test_without_diffusers_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: Any) -> Any:
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return found(name, *rest)

    found = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"class of diffusers, which cannot be imported.*pip install diffusers"):
        explain_sampler(str(config_file(tmp_path, "DiT")))


def test_the_command_says_an_error_in_one_line_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("nowhere") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fusion-compile explain-sampler: there is no nowhere") and not captured.out
    assert run(f"{__name__}:dit_factory", "--roles", "y") == 2
    assert "NAME=ROLE" in capsys.readouterr().err
    assert run(f"{__name__}:dit_factory", "--steps", "0") == 2


def test_a_model_that_cannot_be_exported_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Lumina2Transformer2DModel could not be exported.*transformer_lumina2\.py"):
        explain_sampler(str(config_file(tmp_path, "Lumina2")), sizes=TINY["Lumina2"].sizes)


@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning")
def test_a_model_that_refuses_meta_tensors_is_explained_on_others_without_data(tmp_path: Path) -> None:
    """Mochi asks for autocast on the device of its positions, and there is none for meta tensors."""
    text = explain_sampler(str(config_file(tmp_path, "Mochi")), sizes=TINY["Mochi"].sizes)
    assert "sampler of MochiTransformer3DModel" in text
    assert "nonzero gives a tensor whose size depends on data, so it runs at every step." in text
