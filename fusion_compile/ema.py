"""`EMA`: a moving average of the weights that the training step itself keeps."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from torch import Tensor, nn

from fusion_compile._state.kept_average import KeptAverage
from fusion_compile._state.profiles import Profile, gamma_of, reconstructed, write_snapshot
from fusion_compile.optim.averaged import Average


class EMA(KeptAverage):
    """An exponential moving average of the weights to deploy, updated in the step's own kernels.

    Give it to ``compile_training_step(…, ema=…)`` or ``as_torch_optimizer(…, ema=…)``, or several in a list. It is
    state like any other: a skipped step leaves it, checkpoints hold it, and a resumed run has it bitwise. 1 - decay is
    live as ``step.hyperparameters["ema_rate"]``, in a torch optimizer as a parameter group's ``"ema_rate"``. Under
    Schedule-Free it averages x. Buffers are the model's, not averaged. Of bf16 and fp16 weights the average is fp32, as
    `model` is then. A loss that reads `model` sees the average as it was before the step.

    A torch optimizer keeps it from its first step on. Until then `model` shows the weights that the trained model has
    when `model` is read.

    Args:
        model: The model that is trained; may be left out, since the step knows it.
        decay: ``a ← decay · a + (1 - decay) · weights``; from 0 to 1, 1 excluded.
        warmup: None: `decay` from the first step on. ``"ramp"``: at most ``(1 + s) / (10 + s)``, as diffusers.
            ``(inv_gamma, power)``: at most ``1 - (1 + s / inv_gamma)^-power``, as diffusers (1, 2/3), timm and
            ema_pytorch. s counts steps after `update_after`, from 0; at 0 the average is a copy.
        min_decay: The least decay of a warm-up.
        update_after: So many steps the average is a copy of the weights.
        update_every: Steps between two updates of the average.
        name: Of its tensors in checkpoints (``averages/<name>``), and of its number, ``<name>_ema_rate``. Several
            averages need several names.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> import torch, fusion_compile as fc
        >>> model = torch.nn.Linear(4, 2)
        >>> ema = fc.EMA(model, decay=0.999)
        >>> step = fc.compile_training_step(model, lambda model, x: model(x).square().mean(), ema=ema, mode="eager")
        >>> loss = step(torch.randn(8, 4))
        >>> ema.model(torch.randn(1, 4)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        decay: float = 0.9999,
        *,
        warmup: str | tuple[float, float] | None = None,
        min_decay: float = 0.0,
        update_after: int = 0,
        update_every: int = 1,
        name: str = "ema",
    ) -> None:
        if warmup not in (None, "ramp") and not _is_pair(warmup):
            raise ValueError(f"EMA(warmup={warmup!r}) is not known; give 'ramp', or (inv_gamma, power), both above 0.")
        if not 0 <= decay < 1:
            raise ValueError(f"EMA(decay={decay}) must lie from 0 to 1, 1 excluded: at 1 the average never moves.")
        if not 0 <= min_decay <= decay:
            raise ValueError(f"EMA(min_decay={min_decay}) must lie from 0 to decay={decay}.")
        if update_after < 0 or update_every < 1:
            raise ValueError(f"EMA(update_after={update_after}, update_every={update_every}): use at least 0 and 1.")
        inv_gamma, power = warmup if isinstance(warmup, tuple) else (1.0, 1.0)
        kind = "power" if isinstance(warmup, tuple) else warmup
        average = Average(name, 1 - decay, kind, inv_gamma, power, 0.0, min_decay, update_after, update_every)
        KeptAverage.__init__(self, average, model)

    @classmethod
    def power(cls, model: nn.Module | None = None, sigma_rel: float | Sequence[float] = (0.05, 0.10)) -> list[EMA]:
        """Averages with EDM2's power function profile: in step n the decay is ``(1 - 1/n)^(γ + 1)``.

        Source: 2312.02696, section 3.1 and appendix C.

        Args:
            model: See `EMA`.
            sigma_rel: The width of each profile, relative to the length of the training; above 0 and below 0.28.

        Returns:
            An average for each width, named ``ema_050`` for 0.050. They have no live rate.

        Raises:
            ValueError: A width is out of range.
        """
        found = []
        for width in [sigma_rel] if isinstance(sigma_rel, (int, float)) else sigma_rel:
            average = cls.__new__(cls)
            name = f"ema_{round(width * 1000):03d}"
            KeptAverage.__init__(average, Average(name, 0.0, "profile", gamma=gamma_of(width)), model)
            found.append(average)
        return found

    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Write the average as it is into a folder, for `reconstruct`. Waits for the device.

        Args:
            folder: It is made where it is missing; a snapshot of the same step is replaced. About 20 snapshots of each
                width in a training are enough; 4 bytes a parameter each.

        Raises:
            ValueError: The average is none of `power`, or was never updated.
        """
        if self.average.warmup != "profile":
            raise ValueError(
                f"{self!r} has no power function profile, so nothing can be made of its snapshots; use EMA.power(), or "
                f"save ema.model.state_dict()."
            )
        model = self.model
        taken = max((int(counter.taken) for counter in self.counters.values()), default=0)
        if not taken:
            raise ValueError(f"{self!r} was not updated yet; take a snapshot after a step.")
        weights = {n: p.detach() for n, p in model.named_parameters() if n in self.names}
        write_snapshot(folder, self.average.name, Profile(taken, self.average.gamma), weights)

    @staticmethod
    def reconstruct(folder: str | PathLike[str], sigma_rel: float, updates: int | None = None) -> dict[str, Tensor]:
        """Make the average of another width from snapshots, after the training.

        Source: 2312.02696, section 3.2 and appendix C: least squares over the snapshots' profiles.

        Args:
            folder: Where `snapshot` has written.
            sigma_rel: The wanted width; between and near those that were kept it is accurate.
            updates: Of how many steps; None: of the last snapshot's.

        Returns:
            The weights by parameter name, fp32: ``model.load_state_dict(found, strict=False)`` leaves buffers as they
            are.

        Raises:
            FileNotFoundError: The folder has no snapshots.
            ValueError: A number is out of range, or the snapshots are of different models.

        Example:
            >>> import tempfile, torch, fusion_compile as fc
            >>> model, folder = torch.nn.Linear(4, 2), tempfile.mkdtemp()
            >>> emas = fc.EMA.power(model, sigma_rel=(0.05, 0.10))
            >>> loss_fn = lambda model, x: model(x).square().mean()
            >>> step = fc.compile_training_step(model, loss_fn, ema=emas, mode="eager")
            >>> for n in range(40):
            ...     loss = step(torch.randn(8, 4))
            ...     if n % 4 == 3:
            ...         for ema in emas:
            ...             ema.snapshot(folder)
            >>> sorted(fc.EMA.reconstruct(folder, sigma_rel=0.08))
            ['bias', 'weight']
        """
        return reconstructed(folder, sigma_rel, updates)


def _is_pair(given: object) -> bool:
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and all(isinstance(number, (int, float)) and number > 0 for number in given)
    )
