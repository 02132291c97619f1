"""The state that user code keeps, as entries of a step's flat state, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._state import keys
from fusion_compile._state.residence import Residence
from fusion_compile._step.carried import Carried
from fusion_compile._types import Tensors


class CarriedEntries:
    """What `carried` says, under the keys of `state`."""

    def __init__(self, carried: Carried, state: Tensors) -> None:
        self._carried, self._state = carried, state

    def take_all(self) -> None:
        """Take everything that user code keeps into the state."""
        for path, tensor in self._carried.tensors().items():
            self._store(keys.carried(path), tensor)

    def take_over(self) -> None:
        """What user code did since the last step to the state that it keeps counts from this step on."""
        self._carried.check()
        for path, tensor in self._carried.changed_by_the_user().items():
            self._store(keys.carried(path), tensor)

    def exchange(self, residence: Residence, fresh: Tensors) -> bool:
        """Take buffers that are of another size now out of `fresh`, into the state and the module. Whether there are
        any."""
        grown = keys.section(fresh, keys.BUFFERS)
        for name, kept in (residence.exchange(grown) if grown else {}).items():
            del fresh[keys.buffers(name)]
            self._state[keys.buffers(name)] = kept
            _compat.mark_static(kept)
        return bool(grown)

    def give_back(self, forms: dict[str, Any], fresh: Tensors) -> None:
        """Put what a step computed where user code keeps it. `fresh`: entries that the state did not have."""
        if not self._carried:
            return
        for key, tensor in fresh.items():
            self._store(key, tensor)
        self._carried.put(forms, keys.section(self._state, keys.CARRIED))

    def _store(self, key: str, tensor: Tensor) -> None:
        old = self._state.get(key)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            if old is not tensor:
                with torch.no_grad():
                    old.copy_(tensor)
        else:
            self._state[key] = tensor if keys.split(key)[1] in self._carried.written else tensor.detach().clone()
            _compat.mark_static(self._state[key])
