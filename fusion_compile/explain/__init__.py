"""Reads what was compiled and says what it is; never changes it."""

from typing import Any

from fusion_compile.explain._explanation import Explanation as Explanation


def explain(compiled: Any) -> Any:
    """What was captured, what went where, and why: of a `TrainingStep` or of a sampler. ``print`` the result.

    Raises TypeError for anything else.
    """
    method = getattr(compiled, "explain", None)
    if method is None:
        raise TypeError(
            f"explain() got a {type(compiled).__name__}; it explains what compile_training_step() and "
            f"optimize_sampler() return."
        )
    return method()
