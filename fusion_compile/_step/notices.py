"""What a step says once about how it was captured: as a warning, and in `explain`."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_compile._say_once import SayOnce
from fusion_compile._step.rehearsed import RehearsedStep


class Notices:
    """Warnings, each given once, and the lines of `explain`.

    Attributes:
        because: Why the step was captured by running, where nobody asked for it.
        lines: What else `explain` says, in order.
    """

    def __init__(self) -> None:
        self._warn = SayOnce()
        self.because = ""
        self.lines: list[str] = []

    def warn(self, key: str, sentence: str) -> None:
        """A warning alone."""
        self._warn(key, sentence)

    def runs(self, because: str, changes_batch: Sequence[str] = ()) -> None:
        """The step is captured by running. `because`: why, if nobody asked for it. `changes_batch`: where the loss puts
        something into its batch."""
        self.changes_batch(changes_batch)
        if because:
            self.because = because
            self._warn("runs", f"the step is captured by running it, because {because.rstrip('.')}.")

    def rounds_otherwise(self, difference: str) -> None:
        """The compiled step differs, and the captured graph does not."""
        self._warn(
            "rounding",
            f"the compiled step rounds otherwise than the ordinary loop: {difference}. The captured graph agrees with "
            f"the loop where it is not compiled, so the compiler's rounding makes the difference.",
        )

    def not_by_region(self, objection: str) -> None:
        """The regions of a step do not compute what the ordinary loop does, so it was compiled as one."""
        said = f"the step is compiled as one, because in regions {objection}. Please report the model."
        self._note(said)
        self._warn("regions", said)

    def ran_uncaptured(self, why: str, then: str) -> None:
        """One step ran as Python. `then`: what becomes of the next."""
        self._note(f"a step ran uncaptured, because {why}; {then}.")
        self._warn(f"not yet {why}", f"this step ran uncaptured, because {why}; {then}.")

    def checks_nothing(self) -> None:
        """The loss has ``torch.distributions`` check its arguments, which a captured step leaves out."""
        said = (
            "torch.distributions checks its arguments on the host, which a captured step cannot: it leaves the checks "
            "out, as validate_args=False does. The first step's arguments passed them; a later one that does not is "
            "no error, and may give nan."
        )
        self._note(said)
        self._warn("distributions", said)

    def showed(self, seen: RehearsedStep, *, kept: bool, cut: bool) -> None:
        """What a rehearsal showed that people should know. `kept`: whether the step keeps gradients; `cut`: whether it
        cuts the batch, so that the loss gets copies of its containers."""
        self.reads_gradients(seen.reads_gradient, kept=kept)
        self.changes_batch(seen.changes_batch if cut else ())

    def reads_gradients(self, names: Sequence[str], *, kept: bool) -> None:
        """The loss reads ``.grad`` of the parameters `names`, which have none while it runs. Raises ValueError where
        the step keeps gradients, because such a loss expects the last step's."""
        if not names:
            return
        said = f"the loss reads {names[0]}.grad, which is None while it runs, as after zero_grad() in the ordinary loop"
        if kept:
            raise ValueError(
                f"{said}; keep_gradients=True shows gradients between steps. Give the step what the loss needs of them "
                f"as part of the batch."
            )
        self._warn(
            "gradient", f"{said}. If it means the last step's gradient: keep_gradients=True, and give it in the batch."
        )

    def changes_batch(self, paths: Sequence[str]) -> None:
        """The loss puts something into its batch, at these paths, which this step does in its own copy."""
        if paths:
            self._warn(
                "batch",
                f"the loss puts another value into {paths[0]}. This step does that in its own copy, and the batch "
                f"that it was given stays as it was: return the value as a metric, (loss, {{name: tensor}}), or take "
                f"mode='eager' without accumulate.",
            )

    def _note(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)
