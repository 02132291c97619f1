"""The weights behind a table: noticing that they changed, and letting go of those that only the table needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fusion_compile._types import Tensors
from fusion_compile.passes._compat import empty_unless_held

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_part_of_more(tensor: Tensor) -> bool:
    """Whether `tensor` is a view into a larger storage, as parameters of a `TrainingStep` are views into its banks.

    Writes to such a storage do not count in the view's `_version` when the view was installed by ``.data =``.
    """
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


class WeightWatch:
    """Notices changes of the weights that one program was built from.

    `weights`: full name -> the tensor, for all that the program reads; `hoisted`: the names that its tables depend on.
    Seen at every call, without looking at the device: a parameter replaced by another, in-place writes that count
    versions, ``.data =``. Writes through ``.data`` or to a storage that the parameter is a view of count no version;
    `contents_changed` sees them and waits for the device.
    """

    def __init__(self, model: nn.Module, weights: Tensors, hoisted: Iterable[str]) -> None:
        self._places = [(*_place(model, name), tensor, name) for name, tensor in weights.items()]
        self._hoisted = {name: weights[name] for name in hoisted}
        self.remember()

    def remember(self) -> None:
        """The weights as they are now belong to the tables, or were just released with them up to date."""
        self._versions = self._current_versions()
        self._checksum = self._current_checksum()
        self.must_compare = any(is_part_of_more(t) for t in self._hoisted.values())

    def replaced(self) -> str | None:
        """The name of a parameter or buffer that is no longer the tensor the program reads, or None."""
        for owner, key, tensor, name in self._places:
            if owner.get(key) is not tensor:
                return name
        return None

    def versions_changed(self) -> bool:
        """Whether a hoisted weight has another address or version than remembered."""
        return self._versions != self._current_versions()

    def contents_changed(self) -> bool:
        """Whether the checksum of a hoisted weight differs; reads them all, and on a GPU waits for the result."""
        here = [i for i, t in enumerate(self._hoisted.values()) if t.numel()]  # what was released is empty, not changed
        return not torch.equal(self._checksum[here], self._current_checksum()[here])

    def _current_versions(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._hoisted.values()]

    def _current_checksum(self) -> Tensor:
        sums = [
            t.detach().contiguous().view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in self._hoisted.values()
        ]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _place(model: nn.Module, full_name: str) -> tuple[dict[str, Tensor | None], str]:
    prefix, _, key = full_name.rpartition(".")
    owner = model.get_submodule(prefix)
    return (owner._parameters if key in owner._parameters else owner._buffers), key  # type: ignore[return-value]


@dataclass(frozen=True)
class Released:
    """`bytes`: given back on the model's device. `declined`: full name -> why it was kept."""

    bytes: int
    declined: dict[str, str]


class ReleasableWeights:
    """The weights of `model` that can be taken out of memory, and put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._out: dict[str, Tensor] = {}  # by full name: the tensor of the model, which is empty now
        self._kept: Tensors = {}  # their contents on the CPU, unless dropped

    @property
    def names(self) -> frozenset[str]:
        """Full names of what is out of memory now."""
        return frozenset(self._out)

    @property
    def dropped(self) -> frozenset[str]:
        """Those whose contents are nowhere."""
        return frozenset(self._out) - frozenset(self._kept)

    def release(self, names: frozenset[str], to: Literal["cpu", "drop"]) -> Released:
        """Empty the storage of `names`, keeping the contents on the CPU or not at all.

        A storage is emptied if every tensor of the model that lies in it is named, they fill it and nothing else holds
        it; the others are declined. `to="cpu"` of a model on the CPU moves nothing and gives 0 bytes.
        """
        everything: Tensors = dict(self._model.named_parameters(remove_duplicate=False))
        everything.update(self._model.named_buffers(remove_duplicate=False))
        by_storage: dict[int, list[str]] = {}
        for name, tensor in everything.items():
            if name not in self._out:
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
        released = 0
        declined: dict[str, str] = {}
        for members in by_storage.values():
            wanted = [n for n in members if n in names]
            if not wanted:
                continue
            storage = everything[members[0]].untyped_storage()
            others = [n for n in members if n not in names]
            if storage.nbytes() > sum({id(everything[n]): _bytes(everything[n]) for n in wanted}.values()):
                why = "it is part of a larger storage (a training step's?); call step.release() or sample from a copy"
                declined.update(dict.fromkeys(wanted, why))
            elif others:
                declined.update(dict.fromkeys(wanted, f"it shares its storage with {others[0]}, which is needed"))
            elif not (to == "cpu" and storage.device.type == "cpu"):
                size = storage.nbytes()
                del storage
                if self._take_out({n: everything[n] for n in wanted}, to):
                    released += size
                else:
                    why = "something holds its memory (a TrainingStep?); call step.release() or sample from a copy"
                    declined.update(dict.fromkeys(wanted, why))
        return Released(released, declined)

    def _take_out(self, tensors: Tensors, to: Literal["cpu", "drop"]) -> bool:
        distinct = {id(tensor): tensor for tensor in tensors.values()}
        contents = {key: tensor.detach().to("cpu") for key, tensor in distinct.items()} if to == "cpu" else {}
        if not empty_unless_held(distinct.values()):
            return False
        self._out.update(tensors)
        self._kept.update({name: contents[id(tensor)] for name, tensor in tensors.items() if contents})
        return True

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Put everything back: from the CPU, or what was dropped from `state` (full name -> tensor).

        Raises ValueError, changing nothing, if something dropped is not in `state`.
        """
        source = {**self._kept, **{n: t for n, t in (state or {}).items() if n in self._out}}
        if missing := sorted(set(self._out) - set(source)):
            raise ValueError(
                f"{len(missing)} weights were dropped and nothing was given for them ({', '.join(missing[:3])}, …); "
                f"call restore_weights(state_dict) with the checkpoint they came from."
            )
        for name, tensor in self._out.items():
            if tensor.numel() == 0:
                tensor.data = source[name].detach().to(tensor.device, tensor.dtype, copy=True)
        self._out, self._kept = {}, {}

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Everything that was moved to the CPU is on its device inside, and out again afterwards."""
        moved = {n: t for n, t in self._out.items() if n in self._kept}
        for name, tensor in moved.items():
            if tensor.numel() == 0:
                tensor.data = self._kept[name].to(tensor.device)
        try:
            yield
        finally:
            for tensor in moved.values():
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
