"""timm's factory, layer decay, schedulers and Lookahead with the optimizer classes.

timm imports torchvision, whose wheels are made for torch's CUDA build: on a CPU build their operators are missing, and
importing it fails at the first of them. Two empty declarations in their place let it be imported; timm's optimizers and
schedulers call none of them.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile import optim
from tests.small_models import batches
from tests.torch_loops import close_to_torch

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore", "error:.*Schedule-Free.*")]
_DECLARED = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # there already
        _DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
timm_optim = pytest.importorskip("timm.optim", exc_type=ImportError)
timm_scheduler = pytest.importorskip("timm.scheduler", exc_type=ImportError)

CLASSES: dict[str, Any] = {
    "fcadamw": optim.AdamW,
    "fclion": optim.Lion,
    "fcsfadamw": optim.SFAdamW,
    "fcmuon": optim.Muon,
    "fcnormuon": optim.NorMuon,
    "fcsfnormuon": optim.SFNorMuon,
    "fcfullfusion": optim.FullFusion,
}


class Vit(nn.Module):
    """What timm asks of a model."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(2)])
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}


def register() -> None:
    from timm.optim._optim_factory import OptimInfo, default_registry  # type: ignore[import-not-found, unused-ignore]

    for name, kind in CLASSES.items():
        betas = name in ("fcadamw", "fclion", "fcsfadamw")
        info = OptimInfo(name=name, opt_class=kind, has_eps=False, has_betas=betas, defaults={"mode": "eager"})
        default_registry.register(info)


def trained(model: nn.Module, name: str, **options: Any) -> Any:
    optimizer = timm_optim.create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.05, **options)
    scheduler, _ = timm_scheduler.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=4, warmup_epochs=1, warmup_lr=1e-4
    )
    for epoch, (x, y) in enumerate(batches(4), start=1):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step(epoch)
    return optimizer


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.75}], ids=["groups", "layer decay"])
@pytest.mark.parametrize("prefix", ["", "lookahead_"])
def test_adamw_is_timms_own(prefix: str, options: dict[str, Any]) -> None:
    register()
    model = Vit()
    reference = copy.deepcopy(model)
    mine, theirs = trained(model, f"{prefix}fcadamw", **options), trained(reference, f"{prefix}adamw", **options)
    assert [group["lr"] for group in mine.param_groups] == [group["lr"] for group in theirs.param_groups]
    close_to_torch(model, reference)


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "fcadamw"])
def test_every_class_trains_from_timms_factory(name: str) -> None:
    register()
    model = Vit(128)  # so wide that there are matrices
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "parameter group .* has parameters without names")
        optimizer = trained(model, name)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    if not optimizer.training or "sf" in name or name == "fcfullfusion":
        optimizer.eval()
        model.state_dict()  # a warning of y is an error here
