"""Newton-Schulz orthogonalization in float64: G = U S V^T becomes about U V^T.

    X_0 = G / (s ||G||_F),    X_{k+1} = a_k X_k + b_k (X_k X_k^T) X_k + c_k (X_k X_k^T)^2 X_k

Sources: Jordan, Muon blog post and KellerJordan/Muon; the improved quintic ("you") from microsoft/dion; Polar Express,
arXiv 2505.16932, in the coefficients of modded-nanogpt and dion (safety 2e-2, cushion 2; X / (1.02 ||X|| + 1e-6)).
The last triple is repeated when more steps are asked for than there are triples.
"""

from typing import Literal, NamedTuple

import numpy as np

from tests.oracles.protocol import Array

JORDAN_TRIPLE = (3.4445, -4.7750, 2.0315)


class Coefficients(NamedTuple):
    """(a, b, c) for each step, and how the input is normalized: X / max(s ||X||, eps), or X / (s ||X|| + eps)."""

    steps: tuple[tuple[float, float, float], ...]
    input_scale: float = 1.0
    eps: float = 1e-7
    eps_rule: Literal["clamp", "add"] = "clamp"


JORDAN = Coefficients((JORDAN_TRIPLE,) * 5)
JORDAN_KELLER = JORDAN._replace(eps_rule="add")  # the author's code and NorMuon's add eps; torch clamps
YOU = Coefficients(
    (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )
)
POLAR_EXPRESS = Coefficients(
    (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    input_scale=1.02,
    eps=1e-6,
    eps_rule="add",
)


def newton_schulz(matrix: Array, coefficients: Coefficients = JORDAN, n_steps: int = 5) -> Array:
    """The approximate polar factor of one [r, c] matrix. A zero matrix stays zero."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T  # the Gram matrix is taken on the shorter side; the result is the same
    norm = coefficients.input_scale * float(np.linalg.norm(x))
    x = x / (max(norm, coefficients.eps) if coefficients.eps_rule == "clamp" else norm + coefficients.eps)
    for k in range(n_steps):
        a, b, c = coefficients.steps[min(k, len(coefficients.steps) - 1)]
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ (gram @ x))
    return x if wide else x.T
