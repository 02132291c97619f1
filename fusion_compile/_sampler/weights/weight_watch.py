"""Notice that weights behind a table changed, and which."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fusion_compile._sampler.read_back import ReadBack
from fusion_compile._sampler.weights.checksum import checksums
from fusion_compile._types import Tensors


def is_part_of_more(tensor: Tensor) -> bool:
    """Whether `tensor` is a view into a larger storage, as a `TrainingStep`'s parameters are views into its banks.

    A write to such a storage does not change the view's `_version` if the view was installed by ``.data =``.
    """
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


class WeightWatch:
    """Notices changes of the weights that tables depend on.

    `weights`: full name -> tensor. `constants`: other tensors that the model reads (a plain attribute, a global), by
    any name; a view among them counts its base's versions. `versions_changed` sees in-place writes that count versions,
    and ``.data =``; it does not look at the device. Writes through ``.data``, to a storage that the parameter is a view
    of, or to an inference tensor count no version; `contents_changed` sees them and waits for the device.
    """

    def __init__(self, weights: Tensors, constants: Tensors | None = None) -> None:
        self._constants = frozenset(constants or ())
        self._weights = {**weights, **(constants or {})}
        self._read_back = ReadBack()
        self.accept_current()

    def accept_current(self) -> None:
        """Compare with the weights as they are now: the tables are up to date with them."""
        self._versions = self._current_versions()
        self._checksum = self._current_checksum()
        self.must_compare = any(is_part_of_more(t) for n, t in self._weights.items() if n not in self._constants)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Watch `tensors` (full name -> tensor) instead of the watched weights of these names."""
        self._weights.update({name: t for name, t in tensors.items() if name in self._weights})
        self.accept_current()

    def versions_changed(self) -> frozenset[str]:
        """The weights whose address or version changed."""
        now = self._current_versions()
        if now == self._versions:
            return frozenset()
        return frozenset(name for name, new, old in zip(self._weights, now, self._versions, strict=True) if new != old)

    def contents_changed(self) -> frozenset[str]:
        """The weights whose checksum changed; reads all of them, and on a GPU waits for the result."""
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
