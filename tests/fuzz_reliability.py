"""Draws models, recipes, dtypes, batches, faults and corruptions, and looks for a step that is wrong without a word.

    python -m tests.fuzz_reliability [--minutes 3] [--seed 0]        # or: make fuzz

One case is one training step with a row of events. After each event one law is checked: what was refused has changed
no bit, what was skipped has changed two counts, what was loaded is what was saved. A case that breaks a law ends
the run; ``--shrink`` looks for the smallest one like it. This is no test file: it takes minutes, and each run draws
other cases.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from tests.small_models import bits, differing

try:
    from hypothesis import HealthCheck, Phase, given, seed, settings  # type: ignore[import-not-found, unused-ignore]
    from hypothesis import strategies as st  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    sys.exit("fuzzing needs hypothesis: pip install hypothesis")

TOLD = (ValueError, TypeError, RuntimeError, KeyError, OSError)
"""What a refusal may be. Anything else, an AttributeError from inside say, is a raw error."""
SKIPPED = {"counts/skipped", "steps_called"}
tried: collections.Counter[str] = collections.Counter()


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def _normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 2)
    )


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


MODELS = {"plain": _plain, "normed": _normed, "tied": _tied}
RECIPES = ["adamw", "lion", "sf_adamw", "muon", "normuon", "sf_normuon", "soap", "full_fusion", "loss ratio", "plus"]
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "captured": {"backend": "aot_eager"},
    "captured by running": {"backend": "aot_eager", "capture": "run"},
}
MATRICES = ("muon", "normuon", "sf_normuon", "soap", "full_fusion")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
JUNK: list[Any] = [None, True, -1, "x", [], {}, 1e400, float("nan"), 1e300, -0.5, b"\xff", 3 + 4j]


class Loss:
    """A loss that holds nothing of the case: what hypothesis counts in its objects would count as the loss's."""

    fault = False

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        found = F.mse_loss(model(x).float(), y.float()) + shift
        if self.fault:
            raise ArithmeticError("of the loss itself")
        return found


class Case:
    """One step, what it was made of, and a folder."""

    def __init__(self, draw: Callable[[Any], Any], folder: Path) -> None:
        self.draw, self.folder = draw, folder
        self.model = draw(st.sampled_from(sorted(MODELS)))
        self.recipe, self.dtype = draw(st.sampled_from(RECIPES)), draw(st.sampled_from(DTYPES))
        way = draw(st.sampled_from(sorted(WAYS)))
        tried[f"way: {way}"] += 1
        self.options = {"accumulate": draw(st.sampled_from([1, 2])), **WAYS[way]}
        self.loss = Loss()
        self.step = self.made()
        self.saved: dict[str, bytes] | None = None

    def made(self) -> fc.TrainingStep:
        torch.manual_seed(self.draw(st.integers(0, 3)))
        known = {
            "loss ratio": lambda: fc.optim.scale_lr_by_loss_ratio(fc.optim.adamw(1e-3)),
            "plus": lambda: fc.optim.schedule_free_plus(
                fc.optim.chain(fc.optim.scale_by_adam((0.9, 0.95)), fc.optim.scale_by_learning_rate(0.5)), lr=0.5
            ),
        }
        spectral = [r"2\.weight|3\.weight"] if self.recipe in MATRICES and self.model != "tied" else []
        return fc.compile_training_step(
            MODELS[self.model]().to(self.dtype),
            self.loss,
            optimizer=known.get(self.recipe, self.recipe),
            force_spectral=spectral,
            **self.options,
        )

    def batch(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        size = self.draw(st.sampled_from([4, 6]))
        x, y = torch.randn(size, 4).to(self.dtype), torch.randn(size, 2).to(self.dtype)
        shift = torch.tensor(0.0)
        value = float(kind) if kind in ("nan", "inf") else 0.0
        if kind == "large":
            x = x * 1e30
        elif value:
            y[self.draw(st.integers(0, size - 1)), 0] = value
        return x, y, shift

    # ------------------------------------------------------------------ laws

    def refusing(self, act: Callable[[], object]) -> str:
        """Run `act`. Where it raises, the error is one that tells, and no bit has changed."""
        before, rng = bits(self.step), torch.get_rng_state()
        try:
            act()
        except TOLD as error:
            assert differing(before, bits(self.step)) == [], f"{error} changed the state"
            assert torch.equal(rng, torch.get_rng_state()), f"{error} moved the random state"
            assert str(error).strip() and "object has no attribute" not in str(error), f"a raw error: {error!r}"
            return "refused"
        return "done"

    def finite(self) -> None:
        assert all(bool(p.isfinite().all()) for p in self.step.model.parameters()), "a weight is not finite"
        kept = [t for k, t in self.step._state.items() if k.startswith("optimizer/") and t.is_floating_point()]
        assert all(bool(t.isfinite().all()) for t in kept), "the optimizer's state is not finite"

    # ------------------------------------------------------------------ events

    def steps(self) -> None:
        for _ in range(self.draw(st.integers(1, 3))):
            count = int(self.step.metrics["step"])
            self.step(*self.batch("good"))
            assert int(self.step.metrics["step"]) == count + 1

    def bad_batch(self) -> None:
        before = bits(self.step)
        self.step(*self.batch(self.draw(st.sampled_from(["nan", "inf", "large"]))))
        if not torch.isfinite(self.step.metrics["grad_norm"]):
            assert set(differing(before, bits(self.step))) <= SKIPPED

    def infinite_loss(self) -> None:
        x, y, shift = self.batch("good")
        self.step(x, y, shift + float("inf"))

    def fault_in_the_loss(self) -> None:
        if self.options.get("mode") != "eager":  # a captured step refuses a flag of the loss that changes
            return
        self.loss.fault = True
        before = bits(self.step)
        try:
            self.step(*self.batch("good"))
        except ArithmeticError:
            pass
        except ValueError as error:  # where the loss runs on fake tensors, the sentence holds the fault
            assert "of the loss itself" in str(error)
        finally:
            self.loss.fault = False
        assert differing(before, bits(self.step)) == []

    def interrupt(self) -> None:
        def stop(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        former, batch = signal.signal(signal.SIGALRM, stop), self.batch("good")
        taken = int(self.step.metrics["step"]) + int(self.step.metrics["skipped"])
        called = self.step.steps_called
        try:
            signal.setitimer(signal.ITIMER_REAL, self.draw(st.floats(1e-5, 5e-3)))
            self.step(*batch)
        except KeyboardInterrupt:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
        now = int(self.step.metrics["step"]) + int(self.step.metrics["skipped"])
        assert now - taken == self.step.steps_called - called, "weights and counts are of two steps"

    def number(self) -> None:
        names = sorted(self.step.hyperparameters)
        value = self.draw(st.sampled_from([*JUNK, 1e-3, 0.5, 1e-30, float("inf")]))
        name = self.draw(st.sampled_from(names))
        former = self.step.hyperparameters[name]
        if self.refusing(lambda: self.step.hyperparameters.__setitem__(name, value)) == "done":
            self.step.hyperparameters[name] = former

    def save(self) -> None:
        self.step.save(self.folder)
        self.saved = bits(self.step)

    def load(self) -> None:
        if self.saved is not None:
            self.step = self.made()
            self.step.load(self.folder)
            assert differing(bits(self.step), self.saved) == []

    def corrupt(self) -> None:
        if self.saved is None:
            return
        copy = self.folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        file = self.draw(st.sampled_from(sorted(f.name for f in copy.iterdir())))
        kind = self.draw(st.sampled_from(["flip", "cut", "gone", "noise", "junk"]))
        tried[f"corruption: {kind}"] += 1
        data = bytearray((copy / file).read_bytes())
        at = self.draw(st.integers(0, len(data) - 1))
        if kind == "flip":
            data[at] ^= 1 << self.draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "noise":
            data[at : at + 16] = self.draw(st.binary(min_size=1, max_size=16))
        (copy / file).write_bytes(data)
        if kind == "gone":
            (copy / file).unlink()
        elif kind == "junk":
            index = json.loads((self.folder / "checkpoint.json").read_text())
            index[self.draw(st.sampled_from(sorted(index)))] = self.draw(st.sampled_from([None, -1, "x", [], {}, True]))
            (copy / "checkpoint.json").write_text(json.dumps(index))
        loaded = self.refusing(lambda: self.step.load(copy))
        if loaded == "done":  # a byte that means nothing (a space), or noise that changed nothing
            assert differing(bits(self.step), self.saved) == [], f"{kind} of {file} at {at} was loaded"

    def spoil(self) -> None:
        saved: dict[str, Any] = self.step.state_dict()
        section = self.draw(st.sampled_from(sorted(saved)))
        junk = self.draw(st.sampled_from([*JUNK, torch.zeros(1), torch.zeros(2, 2, dtype=torch.complex64)]))
        if isinstance(saved[section], Mapping) and saved[section] and self.draw(st.booleans()):
            name = self.draw(st.sampled_from(sorted(saved[section])))
            saved[section] = {**saved[section], name: junk}
        else:
            saved[section] = junk
        self.refusing(lambda: self.step.load_state_dict(saved))


EVENTS = [
    Case.steps,
    Case.bad_batch,
    Case.infinite_loss,
    Case.fault_in_the_loss,
    Case.interrupt,
    Case.number,
    Case.save,
    Case.load,
    Case.corrupt,
    Case.spoil,
]


def one_case(data: Any) -> None:
    """Make a step and let events happen to it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        case = Case(data.draw, folder / "ck")
        tried["cases"] += 1
        case.steps()
        case.save()
        for event in data.draw(st.lists(st.sampled_from(EVENTS), min_size=2, max_size=8)):
            tried[event.__name__.replace("_", " ")] += 1
            event(case)
            case.finite()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Draw cases until the time is over, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--shrink", action="store_true", help="make a case that breaks a law smaller, for minutes")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begun, at = time.monotonic(), asked.seed
    options = settings(
        max_examples=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, *([Phase.shrink] if asked.shrink else [])],
    )
    try:
        while time.monotonic() - begun < 60 * asked.minutes:
            seed(at)(options(given(st.data())(one_case)))()
            at += 1
    finally:
        for what, count in sorted(tried.items()):
            print(f"{count:7d}  {what}")
        print(
            f"{tried['cases']} cases tried in {(time.monotonic() - begun) / 60:.1f} minutes, seeds {asked.seed} to {at}"
        )


if __name__ == "__main__":
    main()
