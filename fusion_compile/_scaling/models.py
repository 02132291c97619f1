"""The matrices of published sizes of models, as the cost of training them counts them."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """A transformer by the matrices that it orthogonalizes.

    `block`: rows and columns of the matrices of one block. `tokens`: of one sample, an image or a sequence.
    """

    name: str
    block: tuple[tuple[int, int], ...]
    depth: int
    tokens: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """All matrices."""
        return [*self.block] * self.depth

    @property
    def entries(self) -> int:
        """Entries of all matrices."""
        return sum(rows * columns for rows, columns in self.matrices)


def dit(name: str, hidden: int, depth: int, tokens: int = 256) -> Model:
    """A diffusion transformer: q, k and v in one matrix, an MLP of four times the width, and adaLN's six vectors."""
    h = hidden
    return Model(name, ((3 * h, h), (h, h), (4 * h, h), (h, 4 * h), (6 * h, h)), depth, tokens)


def llama(name: str, hidden: int, depth: int, *, key: int, mlp: int, tokens: int) -> Model:
    """A decoder with grouped keys and values, `key` columns of them, and a gated MLP."""
    attention = ((hidden, hidden), (key, hidden), (key, hidden), (hidden, hidden))
    return Model(name, (*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp)), depth, tokens)


MODELS = {
    m.name: m
    for m in (
        dit("dit-b", 768, 12),
        dit("dit-l", 1024, 24),
        dit("dit-xl", 1152, 28),
        dit("dit-3b", 2304, 32),
        dit("dit-10b", 4096, 33, tokens=1024),
        dit("dit-20b", 5120, 42, tokens=1024),
        llama("llama-1b", 2048, 16, key=512, mlp=8192, tokens=4096),
        llama("llama-8b", 4096, 32, key=1024, mlp=14336, tokens=8192),
    )
}
"""By name; DiT-B, -L and -XL are the published widths and depths, those above are wider and deeper in the same way."""
