"""What the tensors of a real run depend on, and which tensors it writes that existed before.

Memory is followed, not tensor objects: views share what is known of their base, and no activation is kept alive.
"""

from __future__ import annotations

import collections
import enum
import functools
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fusion_compile._capture.rehearsal._compat import (
    Arguments,
    DispatchMode,
    alive,
    copy_of,
    dense_tensors,
    over_memory,
    storage_key,
)
from fusion_compile._capture.sources.who_asks import is_torch
from fusion_compile.passes._user_frame import is_the_users


class Depends(enum.IntFlag):
    """What a tensor's numbers depend on. Sizes and dtypes do not count: ``zeros_like(x)`` depends on nothing.

    `CPU_READ`: it was made after the CPU read a number that depends on inputs or on random numbers
    or a size that does (``float(x.mean())``, ``x.nonzero()``), which may have decided it.
    """

    NOTHING = 0
    INPUTS = 1
    RANDOM = 2
    CPU_READ = 4


class Write(NamedTuple):
    """Memory that existed before and was written. `label`: of a tensor over it, or ``""`` where no slot leads to one.
    `where`: ``"file:line"`` of the user's first write. `runs`: in which runs. `declared`: whether it is an input's."""

    label: str
    where: str
    runs: tuple[int, ...]
    declared: bool
    key: StorageWeakRef


class Provenance(DispatchMode):  # type: ignore[misc]
    """A mode under which runs are made for real; runs are counted from 1 by `next_run`.

    Seen are all operators, those of backward, custom autograd functions, vmap and checkpointing included. The running
    statistics of batch norms count as written, although the operators' schemas do not say so.

    Not seen: numbers that Python reads without an operator (``x.numpy()``, ``x.tolist()``), and what is written
    through numpy or inside of one higher-order operator.

    Args:
        inputs: Tensors on which results depend and that a run may write.
        also_inputs: Tensors on which results depend; a write to one is listed like any other.
        generators: ``(label, generator)`` of users' generators; those that are not torch's are passed over.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        inputs: Iterable[Tensor],
        also_inputs: Iterable[Tensor] = (),
        generators: Iterable[tuple[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.draws: collections.Counter[str] = collections.Counter()
        """By generator, how many operators drew from it."""
        self._generators = [(label, g) for label, g in generators if isinstance(g, torch.Generator)]
        self._depends: dict[StorageWeakRef, Depends] = {}
        self._declared: set[StorageWeakRef] = set()
        self._made: dict[StorageWeakRef, int] = {}
        self._copies: dict[StorageWeakRef, dict[int, torch.UntypedStorage]] = {}
        self._where: dict[StorageWeakRef, str] = {}
        self._cpu = Depends.NOTHING
        self.cpu_reads: set[int] = set()
        """The runs in which the CPU read a number that depends on inputs or on random numbers."""
        self.checks_arguments = False
        """Whether ``torch.distributions`` read numbers to check its arguments. Nothing but an error depends on them."""
        self.dtypes: set[torch.dtype] = set()
        """Of everything that operators returned."""
        self.run = 0
        for tensor in inputs:
            self._declared.update(keys_of([tensor]))
        for key in (*self._declared, *keys_of(also_inputs)):
            self._depends[key] = Depends.INPUTS

    def next_run(self) -> None:
        """A run begins: what its predecessors left behind existed before it, and it has read nothing yet."""
        self.run += 1
        self._cpu = Depends.NOTHING

    @property
    def drew_random(self) -> bool:
        """Whether an operator drew random numbers."""
        return bool(self.draws)

    def of(self, tensor: Tensor) -> Depends:
        """What `tensor` depends on; nothing if it was not made in a run and is no input."""
        found = Depends.NOTHING
        for key in keys_of([tensor]):
            found |= self._depends.get(key, Depends.NOTHING)
        return found

    def runs_that_wrote(self, tensor: Tensor) -> set[int]:
        """The runs in which `tensor`'s memory was written although it existed before the run."""
        return {run for key in keys_of([tensor]) for run in self._copies.get(key, ())}

    def memory_after(self, run: int) -> dict[StorageWeakRef, torch.UntypedStorage]:
        """Copies of all written memory that existed before the first run, as it was at the end of `run`. To be called
        before anything is put back."""
        found = {}
        for key, copies in self._copies.items():
            memory = alive(key)
            if key not in self._made and memory is not None:
                later = [n for n in copies if n > run]
                found[key] = copies[min(later)] if later else copy_of(memory)
        return found

    def is_input(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies in a declared input's memory."""
        return any(key in self._declared for key in keys_of([tensor]))

    def was_made(self, tensor: Tensor) -> bool:
        """Whether `tensor`'s memory is of a run."""
        return any(key in self._made for key in keys_of([tensor]))

    def before_run(self, run: int, tensor: Tensor) -> Tensor:
        """`tensor` with the numbers that it had when `run` began, detached; of memory of its own if it was written."""
        key = storage_key(tensor) if tensor.layout is torch.strided else None
        later = [n for n in self._copies.get(key, ()) if n >= run] if key is not None else []
        return over_memory(tensor, self._copies[key][min(later)]) if later and key is not None else tensor.detach()

    def written(self, tensors: Iterable[tuple[str, Tensor]] = ()) -> list[Write]:
        """Memory that existed before the first run and was written; labels are looked up among `tensors`."""
        labels: dict[StorageWeakRef, str] = {}
        for label, tensor in tensors:
            for key in keys_of([tensor]):
                labels.setdefault(key, label)
        return [
            Write(labels.get(key, ""), self._where[key], tuple(sorted(copies)), key in self._declared, key)
            for key, copies in self._copies.items()
            if key not in self._made and alive(key) is not None
        ]

    def put_back(self) -> None:
        """Give all memory that existed before the first run the bytes that it had, inputs included."""
        for key, copies in self._copies.items():
            memory = alive(key)
            if memory is None or key in self._made:
                continue
            before = copies[min(copies)]
            if memory.nbytes() != before.nbytes():
                memory.resize_(before.nbytes())
            memory.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        about = _arguments(func)
        given = list(_tensors_in((args, kwargs)))
        keys = set(keys_of(given))
        depends = self._cpu
        if not about.reads_sizes_only:
            for key in keys:
                depends |= self._depends.get(key, Depends.NOTHING)
        if about.wraps_new_memory:  # torch.tensor(…) made it, without an operator
            for key in keys - self._depends.keys():
                self._note_new(key, depends)
        written = list(_written(about, args, kwargs))
        for tensor in written:
            self._copy(tensor)
        states = self._states(given, args, kwargs) if about.may_draw else []
        result = func(*args, **kwargs)
        drew = [label for label, generator, state in states if not torch.equal(generator.get_state(), state)]
        if drew:
            self.draws[drew[0]] += 1
            depends |= Depends.RANDOM
        for key in keys_of(written):
            self._depends[key] = self._depends.get(key, Depends.NOTHING) | depends
        made = list(_tensors_in(result))
        self.dtypes.update(tensor.dtype for tensor in made)
        for key in keys_of(made):
            if key not in keys:
                self._note_new(key, depends)
        if about.tells_the_cpu and _checks_arguments(sys._getframe(1)):
            self.checks_arguments = True
        elif about.tells_the_cpu and depends:
            self._cpu = Depends.CPU_READ
            self.cpu_reads.add(self.run)
        return result

    def _note_new(self, key: StorageWeakRef, depends: Depends) -> None:
        self._depends[key] = self._depends.get(key, Depends.NOTHING) | depends
        self._made.setdefault(key, self.run)

    def _copy(self, tensor: Tensor) -> None:
        """Copy the memory of `tensor` before its first write in this run, unless the run has made it."""
        for dense in dense_tensors(tensor):
            key = storage_key(dense)
            if key is None or self._made.get(key) == self.run or dense.device.type == "meta":
                continue
            copies = self._copies.setdefault(key, {})
            if self.run not in copies:
                copies[self.run] = copy_of(dense.untyped_storage())
                self._where.setdefault(key, _user_line())

    def _states(self, given: list[Tensor], args: Any, kwargs: Any) -> list[tuple[str, torch.Generator, Tensor]]:
        """``(label, generator, state)`` of the generators that an operator may draw from."""
        own = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)]
        if own:
            # What arrives is another Python object for the same generator: whose state moves is it.
            labelled = [*self._generators, *(("a generator that no slot leads to", generator) for generator in own)]
        else:
            labelled = [("torch's generator of the CPU", torch.default_generator)]
            devices = {tensor.device for tensor in given}
            if kwargs.get("device") is not None:
                devices.add(torch.device(kwargs["device"]))
            for device in sorted(devices, key=str):
                if device.type == "cuda":
                    index = torch.cuda.current_device() if device.index is None else device.index
                    labelled.append((f"torch's generator of cuda:{index}", torch.cuda.default_generators[index]))
        return [(label, generator, generator.get_state()) for label, generator in labelled]


@functools.lru_cache(maxsize=4096)
def _arguments(operator: Any) -> Arguments:
    return Arguments(operator)


def _written(about: Arguments, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator writes."""
    if not about.written and not about.statistics:
        return
    values = about.given(args, kwargs)
    for i in about.written:
        yield from _tensors_in(values[i])
    if about.statistics:
        named = dict(zip(about.names, values, strict=True))
        if named.get("training", named.get("train", True)) is not False:
            yield from _tensors_in([values[i] for i in about.statistics])


def keys_of(tensors: Iterable[Tensor]) -> Iterator[StorageWeakRef]:
    """Weak references to the memory of `tensors`."""
    for tensor in tensors:
        for dense in dense_tensors(tensor):
            key = storage_key(dense)
            if key is not None:
                yield key


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors_in(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner)


def _checks_arguments(frame: FrameType | None) -> bool:
    """Whether a module of ``torch.distributions`` is what reads a number."""
    while frame is not None and not is_the_users(frame.f_code.co_filename):
        if is_torch(frame.f_code.co_filename, "distributions/"):
            return True
        frame = frame.f_back
    return False


def _user_line() -> str:
    """``"file:line"`` of the innermost frame of the user's, or ``""``."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_the_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
