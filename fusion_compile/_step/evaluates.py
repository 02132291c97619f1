"""`evaluate` and `evaluate_all` of a training step: what is asked for, and means over many batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Literal

import torch

from fusion_compile._progress import following
from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.kept_average import KeptAverage, banks_of
from fusion_compile._step import batches
from fusion_compile._step.containers import map_tensors
from fusion_compile._step.evaluation import Evaluation
from fusion_compile._step.micro_batches import leading_size
from fusion_compile._step.together import put_point
from fusion_compile._step.turn import in_turn
from fusion_compile._step.whole_weights import WholeWeights
from fusion_compile._types import Tensors

Weights = Literal["deployed", "current"] | KeptAverage


class Evaluates(WholeWeights):
    """The part of a step that evaluates. `_evaluation`: the programs that do."""

    layout: Layout
    mode: str
    _evaluation: Evaluation

    def _gather_point(self, *, again: bool) -> None:
        """Let this rank have the whole weights at the gradient point; all ranks do."""
        assert self._meeting is not None
        self._meeting.meet("gathers the gradient point", again=again)
        put_point(self._plan, self._state)

    @contextlib.contextmanager
    def _point_gathered(self) -> Iterator[None]:
        """Inside, this rank has what a step needs whole of what ranks divide. A program gathers weights itself; where
        nothing is captured they are gathered here, because a loss may fail between."""
        gathers = self.mode == "eager" and self._divides_weights() is not None
        if gathers or keys.section(self._state, keys.POINT):
            self._gather_point(again=True)
        try:
            yield
        finally:
            if gathers:
                self._drop_point()

    def _drop_point(self) -> None:
        for bank in keys.section(self._state, keys.POINT):
            del self._state[keys.point(bank)]

    def _whole_point(self) -> Tensors:
        with self._together("reads the gradient point"):
            self._gather_point(again=False)
        point = self._plan.update.gradient_point(self._state, self._plan.update.context(self._state))
        whole = {**point, **keys.section(self._state, keys.POINT)}
        if self._divides_weights() is not None:
            self._drop_point()
        return {b.key: whole[b.key].to(b.dtype) for b in self.layout.banks}

    @in_turn
    def gradient_point(self) -> Tensors:
        """Copy the weights at which the next gradient is taken (Schedule-Free's y).

        Returns:
            The copies by full parameter name. Where ranks divide it, all of them call this together.
        """
        self._check_alive()
        if keys.section(self._state, keys.POINT) or self._divides_weights() is not None:
            return {n: v.clone() for n, v in self.layout.views(self._whole_point()).items()}
        plan = self._plan.update
        point = plan.gradient_point(self._state, plan.context(self._state))
        return {n: v.clone() for n, v in self.layout.views(point).items()}

    def evaluate(
        self,
        *batch: Any,
        weights: Weights = "deployed",
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensors:
        """Compute the loss of `batch` in evaluation mode, without gradients. Nothing of the training changes.

        It is a program of its own, compiled at its first call. State, buffers, metrics and random numbers are as
        before, so training is bitwise the same with and without it. Modules are in evaluation mode by their flag
        `training`; a ``train()`` of their own is not called. A batch is evaluated whole, `accumulate` or not.

        Args:
            *batch: What `loss_fn` gets after the model, as in a step.
            weights: ``"deployed"``: those that the model holds, with Schedule-Free the average x. ``"current"``: those
                at which the next gradient is taken. An `EMA` of this step: its average.
            seed: Of all random numbers that the loss draws from torch, numpy and Python: the same at each call. They
                are those of the uncompiled loss.
            generator: Draws the seed in its place, so that calls differ from one another.

        Returns:
            ``"loss"`` and the loss's metrics, tensors on the device. Nothing waits for it.

        Raises:
            ValueError: `weights` is unknown, or an average that the step does not keep; or the loss is no scalar.
            RuntimeError: The step was released.

        Example:
            >>> import torch, fusion_compile as fc
            >>> model = torch.nn.Linear(4, 2)
            >>> step = fc.compile_training_step(model, lambda model, x: model(x).square().mean(), mode="eager")
            >>> sorted(step.evaluate(torch.randn(8, 4)))
            ['loss']
        """
        return self._evaluated(batch, weights, seed if generator is None else _drawn(generator))

    @in_turn
    def _evaluated(self, batch: tuple[Any, ...], weights: Weights, seed: int) -> Tensors:
        self._check_whole()
        if self._is_behind():
            with self._together("evaluates"):
                self._meet_and_publish("publishes its weights")
        if self._divides_weights() is not None and not self._shows_whole:
            raise RuntimeError(
                "evaluate() with shard='full' outside of `with step.gathered():`; each rank has only its own matrices "
                "then. Enter that on all ranks, and evaluate inside."
            )
        banks = {key: bank.detach() for key, bank in self._banks(weights).items()}
        return {name: t.clone() for name, t in self._evaluation.run(banks, batch, seed).items()}

    def evaluate_all(
        self,
        loader: Iterable[Any],
        *,
        weights: Weights = "deployed",
        seed: int = 0,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> Tensors:
        """Evaluate every batch of `loader`: the means over all entries of loss and metrics.

        A batch counts by its leading size, or by the metric that the step's `weigh_by` names, which is summed. A
        batch that is a tuple or a list is spread over the loss's arguments. Tensors are moved to the model's device. A
        progress bar shows on stderr where a person watches, in notebooks too.

        Args:
            loader: A DataLoader, or any iterable of batches.
            weights: As in `evaluate`.
            seed: Of the first batch's random numbers, from which those of the others follow: the same at each call.
            generator: In the place of `seed`.
            progress: False shows no bar.

        Returns:
            The means by name, fp64 (fp32 where the device has no fp64), and ``"batches"`` and ``"entries"``, counts.

        Raises:
            ValueError: `loader` has no batches, or a metric is of another shape in one of them.

        Example:
            >>> import torch, fusion_compile as fc
            >>> model = torch.nn.Linear(4, 2)
            >>> step = fc.compile_training_step(model, lambda model, x: model(x).square().mean(), mode="eager")
            >>> data = torch.utils.data.TensorDataset(torch.randn(20, 4))
            >>> means = step.evaluate_all(torch.utils.data.DataLoader(data, batch_size=8))
            >>> int(means["batches"]), int(means["entries"])
            (3, 20)
        """
        draws = torch.Generator().manual_seed(seed) if generator is None else generator
        means = _Means(self.layout.device, self._plan.options.weigh_by)
        count = len(loader) if isinstance(loader, Sized) else None
        for item in following(loader, count, "evaluating") if progress else loader:
            given = tuple(item) if type(item) in (tuple, list) else (item,)
            taken, _ = batches.taken(given, self.layout.device)
            batch = map_tensors(lambda t: t.to(self.layout.device, non_blocking=True), taken)
            means.add(self._evaluated(batch, weights, _drawn(draws)), batch)
        return means.now()

    def _banks(self, weights: Weights) -> Tensors:
        plan, layout = self._plan.update, self.layout
        if isinstance(weights, KeptAverage):
            if weights not in self._plan.options.averages:
                raise ValueError(
                    f"evaluate(weights={weights!r}): the step does not keep this average; give it to "
                    f"compile_training_step(…, ema=…), or evaluate the model that holds those weights."
                )
            return banks_of(weights.average, layout, self._state)
        if weights not in ("deployed", "current"):
            raise ValueError(f"evaluate(weights={weights!r}) is not known; give 'deployed', 'current' or an EMA.")
        if weights == "deployed" or plan.transform.gradient_point is None:
            return self._residence.banks
        if self._divides_weights() is not None:
            raise ValueError(
                "evaluate(weights='current') with shard='full', where the gradient point is another than the model's "
                "weights; give weights='deployed', or copy step.gradient_point() into a model of your own."
            )
        if keys.section(self._state, keys.POINT):
            return self._whole_point()
        with torch.no_grad():
            point = plan.gradient_point(self._state, plan.context(self._state))
        return {b.key: point[b.key].to(b.dtype) for b in layout.banks}


class _Means:
    """Weighted sums over batches, on the device."""

    def __init__(self, device: torch.device, weigh_by: str | None) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device, self._weigh_by = device, weigh_by
        self._sums: Tensors = {}
        self._weights: Tensors = {}
        self._batches = self._entries = 0

    def add(self, found: Tensors, batch: tuple[Any, ...]) -> None:
        """Add what one batch gave."""
        sizes = [t for t in batches.tensors(batch) if t.ndim]
        entries = leading_size(batch) if sizes else 1
        self._batches, self._entries = self._batches + 1, self._entries + entries
        weight = torch.full((), entries, dtype=self._dtype, device=self._device)
        if self._weigh_by is not None:
            if self._weigh_by not in found:
                raise ValueError(f"weigh_by={self._weigh_by!r} names no metric that the loss returned in evaluation.")
            weight = found[self._weigh_by].to(self._dtype)
        for name, value in found.items():
            counts = name == self._weigh_by
            term = value.to(self._dtype) if counts else value.to(self._dtype) * weight
            before = self._sums.get(name)
            if before is not None and before.shape != term.shape:
                raise ValueError(
                    f"the metric {name!r} is {list(before.shape)} in one batch and {list(term.shape)} in another, so "
                    f"it has no mean; return one shape, or evaluate batch by batch."
                )
            share = torch.ones_like(weight) if counts else weight
            self._sums[name] = term if before is None else before + term
            self._weights[name] = share if before is None else self._weights[name] + share

    def now(self) -> Tensors:
        """The means so far."""
        if not self._batches:
            raise ValueError("evaluate_all() got a loader without batches; a generator is empty after its first use.")
        means = {n: s if n == self._weigh_by else s / self._weights[n] for n, s in self._sums.items()}
        counts = {"batches": self._batches, "entries": self._entries}
        return means | {n: torch.tensor(c, device=self._device) for n, c in counts.items() if n not in means}


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
