"""CMuon (arXiv 2608.02502): a fused matrix is several matrices, and each of them is a parameter of its own.

So the twin cuts the named matrices into their blocks, "qkv#0", "qkv#1", ..., hands all of them to another twin (Muon,
NorMuon), and puts the blocks together again where weights or gradients are shown. Source: a reading note on the paper,
whose text was not readable; its optional scale sqrt(number of blocks) is not here.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from tests.oracles.protocol import Given, Oracle, Tensors, float64_copies

Sizes = tuple[tuple[int, ...], int]  # along an axis of the matrix: 0 for rows, 1 for columns


class CMuon:
    """`make(params, spectral)` builds the twin that sees the blocks; `blocks` says by name how a matrix is cut."""

    def __init__(
        self,
        params: Given,
        *,
        spectral: Collection[str],
        blocks: Mapping[str, Sizes],
        make: Callable[[Tensors, Collection[str]], Oracle],
    ) -> None:
        self.blocks = dict(blocks)
        self.names = tuple(params)
        cut_names = [cut for name in spectral for cut in self._cut_names(name)]
        self.base = make(self._cut(params), cut_names)
        self.lr = self.base.lr

    def gradient_point(self) -> Tensors:
        return self._whole(self.base.gradient_point())

    def weights(self) -> Tensors:
        return self._whole(self.base.weights())

    def step(self, grads: Given) -> None:
        self.base.lr = self.lr
        self.base.step(self._cut(grads))

    def _cut_names(self, name: str) -> list[str]:
        return [f"{name}#{i}" for i in range(len(self.blocks[name][0]))] if name in self.blocks else [name]

    def _cut(self, given: Given) -> Tensors:
        parts: Tensors = {}
        for name, whole in float64_copies(given).items():
            if name in self.blocks:
                sizes, axis = self.blocks[name]
                pieces = np.split(whole, np.cumsum(sizes)[:-1], axis)
                parts |= dict(zip(self._cut_names(name), (piece.copy() for piece in pieces), strict=True))
            else:
                parts[name] = whole
        return parts

    def _whole(self, parts: Tensors) -> Tensors:
        whole: Tensors = {}
        for name in self.names:
            pieces = [parts[cut] for cut in self._cut_names(name)]
            whole[name] = np.concatenate(pieces, self.blocks[name][1]) if name in self.blocks else pieces[0]
        return whole
