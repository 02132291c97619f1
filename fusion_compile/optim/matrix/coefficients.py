"""Coefficients of the quintic iteration ``X ← aX + (bA + cA²)X``, ``A = XXᵀ``: one (a, b, c) for each iteration."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

Coefficients: TypeAlias = tuple[tuple[float, float, float], ...]

JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Keller Jordan's Muon and ``torch.optim.Muon``: the same triple five times. Singular values in [0.68, 1.13] from
1e-2 up."""

QUINTIC: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""The improved quintic (You; dion ``newton_schulz_triton.py``): [0.978, 1.032] from 1e-2 up."""

POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Polar Express (Amsel et al., 2505.16932), safety factor 2e-2, cushion 2; expects ``X / (1.02 ‖X‖)``: [0.847, 1.141]
from 1e-3 up.
"""


class Polynomial(NamedTuple):
    """An iteration as its source runs it: coefficients, and the norm by which the input is divided first.

    The divisor is ``max(scale · ‖X‖, floor) + offset``. `bound`: largest singular value of the result in exact
    arithmetic. `room`: the relative error that a singular value may have between two iterations before the rest
    diverges.
    """

    coefficients: Coefficients
    bound: float
    room: float
    scale: float = 1.0
    floor: float = 1e-7
    offset: float = 0.0


# CANS (2506.10935) and the unscaled Polar Express (2505.16932) are left out: they have no room at all (`room` 0), and
# diverge in fp16 and bf16 as soon as a few directions dominate, with plain iterations too.
POLYNOMIALS: dict[str, Polynomial] = {
    "jordan": Polynomial(JORDAN, bound=1.2024, room=0.05),
    "quintic": Polynomial(QUINTIC, bound=1.1451, room=0.038),
    "polar_express": Polynomial(POLAR_EXPRESS, bound=1.1412, room=0.021, scale=1.02, floor=0.0, offset=1e-6),
}
