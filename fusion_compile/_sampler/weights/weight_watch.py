"""Noticing that weights behind a table changed, and which."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fusion_compile._sampler.read_back import ReadBack
from fusion_compile._sampler.weights.checksum import checksums
from fusion_compile._types import Tensors


def is_part_of_more(tensor: Tensor) -> bool:
    """Whether `tensor` is a view into a larger storage, as parameters of a `TrainingStep` are views into its banks.

    Writes to such a storage do not count in the view's `_version` when the view was installed by ``.data =``.
    """
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


class WeightWatch:
    """Notices changes of the weights that tables depend on.

    `weights`: full name -> the tensor. Seen at every call, without looking at the device: in-place writes that count
    versions, ``.data =``. Writes through ``.data``, to a storage that the parameter is a view of, or to an inference
    tensor count no version; `contents_changed` sees them and waits for the device.
    """

    def __init__(self, weights: Tensors) -> None:
        self._weights = dict(weights)
        self._read_back = ReadBack()
        self.remember()

    def remember(self) -> None:
        """The weights as they are now belong to the tables, or were just released with them up to date."""
        self._versions = self._current_versions()
        self._checksum = self._current_checksum()
        self.must_compare = any(map(is_part_of_more, self._weights.values()))

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Watch those of `tensors` (full name -> tensor) that are watched under these names instead."""
        self._weights.update({name: t for name, t in tensors.items() if name in self._weights})
        self.remember()

    def versions_changed(self) -> frozenset[str]:
        """The weights that have another address or version than remembered."""
        now = self._current_versions()
        if now == self._versions:
            return frozenset()
        return frozenset(name for name, new, old in zip(self._weights, now, self._versions, strict=True) if new != old)

    def contents_changed(self) -> frozenset[str]:
        """The weights with another checksum than remembered; reads them all, and on a GPU waits for the result."""
        differs = self._checksum != self._current_checksum()
        (seen,) = self._read_back.now(differs)
        # what was released is empty, not changed
        return frozenset(
            n for (n, t), new in zip(self._weights.items(), seen.tolist(), strict=True) if new and t.numel()
        )

    def uncounted(self) -> frozenset[str]:
        """The weights that count no versions."""
        return frozenset(name for name, t in self._weights.items() if t.is_inference())

    def _current_versions(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._weights.values()]

    def _current_checksum(self) -> Tensor:
        return checksums(list(self._weights.values()))
