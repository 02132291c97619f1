"""Release weights that only a table needed, and put them back."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion_compile._types import Tensors
from fusion_compile.passes._compat import empty_unless_held


@dataclass(frozen=True)
class Released:
    """`bytes`: given back on the model's device, on CUDA by the allocator's count, elsewhere the size of storages that
    nothing holds any more. `declined`: full name -> why the weight was kept."""

    bytes: int
    declined: dict[str, str]


_OF_MODELS: weakref.WeakValueDictionary[int, ReleasableWeights] = weakref.WeakValueDictionary()
"""By the identity of a model, which its entry keeps alive."""


class ReleasableWeights:
    """The weights of `model` that can be taken out of memory, and put back. Samplers of one model share it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._out: dict[str, Tensor] = {}  # by full name: the tensor of the model, which is empty now
        self._kept: Tensors = {}  # their contents on another device, unless dropped
        self._shapes: dict[str, torch.Size] = {}  # those that the tensors had

    @classmethod
    def of(cls, model: nn.Module) -> ReleasableWeights:
        """Those of `model`: what one sampler released is out of memory for every other."""
        shared = _OF_MODELS.get(id(model))
        if shared is None:
            shared = _OF_MODELS[id(model)] = cls(model)
        return shared

    @property
    def names(self) -> frozenset[str]:
        """Full names of the weights that are out of memory now."""
        return frozenset(self._out)

    @property
    def dropped(self) -> frozenset[str]:
        """Full names of those whose contents were dropped."""
        return frozenset(self._out) - frozenset(self._kept)

    def release(self, names: frozenset[str], needed: frozenset[str], to: torch.device | None) -> Released:
        """Empty the storage of `names` that are not `needed`; keep the contents on the device `to`, None drops them.

        A tensor with several names goes by any of them. A storage is emptied if every tensor of the model that lies in
        it may go, they fill it and nothing else holds it; the others are declined. Weights that are on `to` already do
        not move, and count 0 bytes.
        """
        everything: Tensors = dict(self._model.named_parameters(remove_duplicate=False))
        everything.update(self._model.named_buffers(remove_duplicate=False))
        may_go = {id(everything[n]) for n in names} - {id(everything[n]) for n in needed}
        by_storage: dict[int, list[str]] = {}
        for name, tensor in everything.items():
            if name not in self._out:
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
        gpus = {t.device for t in everything.values() if t.device.type == "cuda"} - {to}
        released, allocated = 0, _allocated(gpus)
        declined: dict[str, str] = {}
        for members in by_storage.values():
            wanted = [n for n in members if id(everything[n]) in may_go]
            if not wanted:
                continue
            storage = everything[members[0]].untyped_storage()
            others = [n for n in members if id(everything[n]) not in may_go]
            if storage.nbytes() > sum({id(everything[n]): everything[n].nbytes for n in wanted}.values()):
                why = "it is part of a larger storage (a training step's?); call step.release() or sample from a copy"
                declined.update(dict.fromkeys(wanted, why))
            elif others:
                declined.update(dict.fromkeys(wanted, f"it shares its storage with {others[0]}, which is needed"))
            elif storage.device != to:
                size = storage.nbytes()
                del storage
                if self._take_out({n: everything[n] for n in wanted}, to):
                    released += size
                else:
                    why = "something holds its memory (a TrainingStep?); call step.release() or sample from a copy"
                    declined.update(dict.fromkeys(wanted, why))
        return Released(allocated - _allocated(gpus) if gpus else released, declined)

    def _take_out(self, tensors: Tensors, to: torch.device | None) -> bool:
        distinct = {id(tensor): tensor for tensor in tensors.values()}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        contents = {} if to is None else {key: tensor.detach().to(to) for key, tensor in distinct.items()}
        if not empty_unless_held(distinct.values()):
            return False
        self._out.update(tensors)
        self._shapes.update(shapes)
        self._kept.update({name: contents[id(tensor)] for name, tensor in tensors.items() if contents})
        return True

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Put everything back: from the device it was moved to, or, if dropped, from `state` (full name -> tensor).

        Raises ValueError, changing nothing, if a dropped weight is not in `state`, or a tensor there has another shape.
        """
        source = {**self._kept, **{n: t for n, t in (state or {}).items() if n in self._out}}
        if missing := sorted(set(self._out) - set(source)):
            raise ValueError(
                f"{len(missing)} weights were dropped and nothing was given for them ({', '.join(missing[:3])}, …); "
                f"call restore_weights(state_dict) with the checkpoint they came from."
            )
        for name in self._out.keys() & (state or {}).keys():
            found, shape = source[name], self._shapes[name]
            if not isinstance(found, Tensor) or found.shape != shape:
                what = f"{list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
                raise ValueError(
                    f"{name} is {what} in what was given and {list(shape)} in the model; nothing was restored. Call "
                    f"restore_weights(state_dict) with the checkpoint of this model."
                )
        for name, tensor in self._out.items():
            if tensor.numel() == 0:
                tensor.data = source[name].detach().to(tensor.device, tensor.dtype, copy=True)
        self._out, self._kept = {}, {}

    def refuse_if_out(self, what: str) -> None:
        """Raise RuntimeError, with `what` named, if any weight is out of memory."""
        if self._out:
            raise RuntimeError(
                f"{what} needs weights that release_weights took out of memory ({min(self._out)} and "
                f"{len(self._out) - 1} more); call restore_weights first."
            )

    def refuse_if_out_among(self, needed: Iterable[str], what: str) -> None:
        """Raise RuntimeError, with `what` named, if one of the weights `needed` is out of memory."""
        if missing := sorted(set(self._out) & set(needed)):
            raise RuntimeError(
                f"{what} reads weights that release_weights took out of memory ({missing[0]} and "
                f"{len(missing) - 1} more): its cost model keeps other values than that of the shapes before. Call "
                f"restore_weights first."
            )

    def refuse_if_dropped(self, needed: Iterable[str], what: str, remedy: str) -> None:
        """Raise RuntimeError, with `what` and `remedy` named, if one of the weights `needed` was dropped."""
        if missing := sorted(self.dropped & set(needed)):
            raise RuntimeError(
                f"{what} needs weights that release_weights(to='drop') dropped ({missing[0]} and "
                f"{len(missing) - 1} more); restore_weights(state_dict) first, or {remedy}."
            )

    def were_replaced(self, names: Iterable[str]) -> None:
        """Forget `names`: the model has other tensors there now."""
        for name in names:
            self._out.pop(name, None)
            self._kept.pop(name, None)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Inside the block, weights that were moved away are back on their device."""
        moved = {n: t for n, t in self._out.items() if n in self._kept}
        for name, tensor in moved.items():
            if tensor.numel() == 0:
                tensor.data = self._kept[name].to(tensor.device)
        try:
            yield
        finally:
            for tensor in moved.values():
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def destination(to: str | torch.device) -> torch.device | None:
    """The device that `to` names, with its index; None for "drop". Raises ValueError for anything else."""
    if to == "drop":
        return None
    try:
        device = torch.empty(0, device=to).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"to={to!r} ({str(error).splitlines()[0]}); use 'drop', or a device that is there, such as 'cpu'."
        ) from error
    if device.type == "meta":
        raise ValueError("to='meta': a meta device holds no contents; use 'drop' to keep nothing.")
    return device


def _allocated(gpus: Iterable[torch.device]) -> int:
    """Bytes that tensors occupy on `gpus`."""
    return sum(map(torch.cuda.memory_allocated, gpus))
