"""Tensors that a module holds as plain attributes: neither parameters nor buffers, and often a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fusion_compile._program.program import Program
from fusion_compile.explain import _compat
from fusion_compile.explain._graph.static_findings import defined_at, written_inputs
from fusion_compile.passes import Finding
from fusion_compile.passes._user_frame import user_line

_REGISTERED = ("_parameters", "_buffers", "_modules")


class _Slot(NamedTuple):
    """A place that holds a tensor: an entry of a module's or an object's ``__dict__``, of a dictionary or a list."""

    owner: nn.Module
    name: str
    container: Any
    key: Any
    tensor: Tensor

    @property
    def now(self) -> Any:
        try:
            return self.container[self.key]
        except (KeyError, IndexError):
            return None


class PlainAttributes:
    """The plain attributes of modules at one moment, and what a program does to them.

    torch takes the address of a tensor that it reaches through a module as fixed, whoever replaces it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        found = {(id(s.container), s.key): s for module in modules for s in _slots(module)}
        self._slots = list(found.values())
        self._unmarked = [s for s in self._slots if not _compat.is_static(s.tensor)]
        self._read: list[tuple[Program, dict[str, _Slot]]] = []
        self._made: dict[int, tuple[Tensor, fx.Node]] = {}
        self._replaced: list[tuple[_Slot, str]] = []

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(slot.tensor for slot in self._slots)

    def put_back(self) -> None:
        """Put every tensor into its place again, and remove the marks that Dynamo left on them. Their values stay."""
        for slot in self._slots:
            if slot.now is not None and slot.now is not slot.tensor:
                slot.container[slot.key] = slot.tensor
        for slot in self._unmarked:
            _compat.forget_static(slot.tensor)

    def ran(self, program: Program, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Note that `program` ran on `inputs`."""
        slots = {id(slot.tensor): slot for slot in self._unmarked}
        placeholders = program.graph.graph.find_nodes(op="placeholder")
        pairs = zip(placeholders, inputs, strict=False)
        self._read.append((program, {node.name: slots[id(t)] for node, t in pairs if id(t) in slots}))
        (results,) = program.graph.graph.output_node().args
        nodes = results if isinstance(results, (tuple, list)) else (results,)
        for value, node in zip(outputs, nodes, strict=False):
            if isinstance(value, Tensor) and isinstance(node, fx.Node):
                self._made[id(value)] = (value, node)

    def look(self) -> None:
        """Note which attributes are other tensors of the same size now."""
        for slot in self._slots:
            now = slot.now
            if isinstance(now, Tensor) and now is not slot.tensor and now.shape == slot.tensor.shape:
                made = self._made.get(id(now))
                self._replaced.append((slot, user_line(made[1]) if made else ""))

    def findings(self) -> list[Finding]:
        """Return a finding for each attribute that the program replaces, or writes in place."""
        found = [
            Finding(
                "unmarked_mutation",
                slot.name,
                line or defined_at(slot.owner),
                f"The call binds another tensor to the attribute {slot.name}. torch takes the address of a module's "
                "tensor as fixed, so a CUDA graph is recorded again at every call, and the tensor lies in the graph's "
                "own memory, which the next replay overwrites.",
                "Hold it in a buffer (register_buffer with persistent=False) and write into it: copy_ instead of =.",
            )
            for slot, line in self._replaced
        ]
        for program, slots in self._read:
            written = {} if program.not_in_aten or not slots else written_inputs(program)
            found += [
                Finding(
                    "unmarked_mutation",
                    slots[name].name,
                    line,
                    f"The program writes {slots[name].name} in place, which is a plain attribute and no buffer. torch "
                    "takes its address as fixed: a CUDA graph is recorded again whenever it is replaced. And to() does "
                    "not move it.",
                    "Hold it in a buffer (register_buffer with persistent=False), and never replace it.",
                    "warning",
                )
                for name, line in written.items()
                if name in slots
            ]
        return found


def _slots(module: nn.Module) -> Iterator[_Slot]:
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(owner).items():
            if name not in _REGISTERED:
                yield from _within(owner, prefix + name, vars(owner), name, value)


def _within(owner: nn.Module, name: str, container: Any, key: Any, value: Any, depth: int = 0) -> Iterator[_Slot]:
    if isinstance(value, Tensor):
        yield _Slot(owner, name, container, key, value)
    elif depth < 2 and isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for inner, held in list(pairs):
            yield from _within(owner, f"{name}[{inner!r}]", value, inner, held, depth + 1)
    elif depth < 2 and not isinstance(value, (nn.Module, type)) and hasattr(value, "__dict__"):
        for inner, held in list(vars(value).items()):
            yield from _within(owner, f"{name}.{inner}", vars(value), inner, held, depth + 1)
