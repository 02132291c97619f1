"""Whether a call reads the values that a program was specialised on."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping

from torch import Tensor

from fusion_compile._sampler.graph.call import Call
from fusion_compile._sampler.graph.host_reads import ReadGraph
from fusion_compile._sampler.split import SplitDenoiser
from fusion_compile._sampler.weights.unservable import Unservable
from fusion_compile.passes import BindingTime, binding_times

MOST_VALUES = 8
"""Programs for calls that differ only in values that the model reads from tensors."""
MOST_NUMBERS_OF_STEP = 2
"""The same where the timestep decides one of the values and it is no bool: it has another value at each step."""

_REMEMBERED = 4
"""Requests whose answer is kept."""


class Specialised:
    """What was read from tensors when the graph of `split` was traced, to be read again for other calls.

    Raises `Unservable` if the latent decides it, because it then differs at every call.
    """

    def __init__(self, split: SplitDenoiser, model_name: str) -> None:
        self._reads: ReadGraph | None = split.traced.reads
        self._answers: deque[tuple[_Identity, bool]] = deque(maxlen=_REMEMBERED)
        self.most = MOST_VALUES
        if self._reads is None:
            return
        names = self._reads.inputs
        self._at = {name: i for i, name in enumerate(split.traced.inputs) if name in names}
        self._full_names = {name: split.full_names[name] for name in names if name in split.full_names}
        self._tensors = {name: t for name, t in split.traced.weights.items() if name in names}
        self._refuse_latent(split, model_name)

    def _refuse_latent(self, split: SplitDenoiser, model_name: str) -> None:
        assert self._reads is not None
        inputs = {name: split.times[name] for name in self._at}
        times = binding_times(self._reads.graph, inputs)
        for node, read in self._reads.read_nodes():
            if times[node] is BindingTime.LIVE:
                live = [name for name in self._at if inputs[name] is BindingTime.LIVE]
                raise Unservable(
                    f"{model_name} reads the contents of a tensor at {read.where}, and "
                    f"{', '.join(live) or 'something random'} decides it, which changes at every call. A graph has one "
                    f"branch; use tensor operations there."
                )
            if times[node].per_step and not isinstance(read.value, bool):
                self.most = MOST_NUMBERS_OF_STEP

    @property
    def where(self) -> str:
        """The lines that read, or ""."""
        reads = [] if self._reads is None else self._reads.read_nodes()
        return ", ".join(dict.fromkeys(read.where for _, read in reads))

    @property
    def weight_names(self) -> frozenset[str]:
        """Full names of the weights that decide what is read."""
        return frozenset() if self._reads is None else frozenset(self._full_names.values())

    def fits(self, call: Call) -> bool:
        """Whether `call`, of the program's key, reads the same values. Waits for the device if it is new."""
        if self._reads is None:
            return True
        given = {name: call.tensors[i] for name, i in self._at.items()}
        values = {**self._tensors, **given}
        for identity, answer in self._answers:
            if identity.is_of(values):
                return answer
        answer = self._reads.holds(values)
        if not any(t.is_inference() for t in values.values()):
            self._answers.append((_Identity(values), answer))
        return answer

    def forget(self) -> None:
        """Read again: a weight that decides was written without a version."""
        self._answers.clear()

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Read `tensors` (full name -> tensor) instead of the weights of these names."""
        if self._reads is not None:
            self._tensors |= {n: tensors[full] for n, full in self._full_names.items() if full in tensors}


class _Identity:
    """Tensors by object, address and version."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._refs = [weakref.ref(t) for t in values.values()]
        self._places = [(t.data_ptr(), t._version) for t in values.values()]

    def is_of(self, values: Mapping[str, Tensor]) -> bool:
        """Whether `values` are the same tensors, unchanged since."""
        return all(
            ref() is t and not t.is_inference() and place == (t.data_ptr(), t._version)
            for ref, place, t in zip(self._refs, self._places, values.values(), strict=True)
        )
