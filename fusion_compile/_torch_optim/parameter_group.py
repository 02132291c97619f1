"""One parameter group of a torch optimizer as flat state: banks of its parameters, the transform's state, the numbers.

Keys are those of a training step (``_trace.initial_state``) below the group's number: ``0/params/<bank>``,
``0/module/<bank>``, ``0/optimizer/<path>``, ``0/hyperparameters``. The parameters themselves are views into the
``module`` banks; ``params`` is another bank where the optimizer works on other weights than the model holds: the fp32
master of a half-precision parameter, or x where the parameters hold the gradient point y.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._state import flat_tree
from fusion_compile._state.banks import Bank, build_layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.residence import Residence
from fusion_compile._state.routing import Route
from fusion_compile._types import Tensors
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Context, Transform, bound

Parts = Mapping[str, Tensor]
"""What an optimizer keeps of one parameter, by name: ``{"0.mu": [m, n], "0.count": 0-dim, …}``."""


def holder(members: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module whose ``named_parameters()`` are `members`, whatever their names look like."""
    module = nn.Module()
    module._parameters.update(members)  # register_parameter() refuses the dots that full names have
    return module


class ParameterGroup:
    """The trainable parameters of one group in banks, with all that their update needs. `at`: the group's number.

    `transform` knows its banks. `moves`: the parameters hold its gradient point while training. `state`: all tensors.
    """

    def __init__(
        self,
        at: int,
        members: Mapping[str, nn.Parameter],
        routes: tuple[Route, ...],
        transform: Transform,
        numbers: Mapping[str, float | Schedule],
    ) -> None:
        module = holder(members)
        self.at, self.members, self.routes = at, dict(members), routes
        self.layout = build_layout(module, routes)
        self.transform = bound(transform, self.layout.infos)
        self.moves = self.transform.gradient_point is not None
        self.hyperparameters = Hyperparameters(numbers, self.layout.device, self.layout.state_dtype)
        banks = Residence(module, self.layout).banks
        self._places = {n: p.detach() for n, p in self.members.items()}
        self._versions: dict[str, int] = {}
        self._present: tuple[frozenset[str], Tensors] | None = None

        self.state: Tensors = {f"{at}/hyperparameters": self.hyperparameters.tensor}
        for bank in self.layout.banks:
            own = banks[bank.key]
            if self.apart(bank):
                self.state[f"{at}/module/{bank.key}"] = own
                own = own.to(self.layout.state_dtype, copy=True)
            self.state[f"{at}/params/{bank.key}"] = own
        optimizer = self.transform.init(self.params)
        self.form = flat_tree.form(optimizer, f"{at}/optimizer")
        self.state.update(flat_tree.flatten(optimizer, f"{at}/optimizer"))
        for tensor in self.state.values():
            _compat.mark_static(tensor)
        self.note_versions()

    # ------------------------------------------------------------------ where the weights are

    def apart(self, bank: Bank) -> bool:
        """Whether the optimizer's weights of `bank` are other memory than the model's."""
        return self.moves or bank.dtype != self.layout.state_dtype

    @property
    def params(self) -> Tensors:
        """The weights that the optimizer updates, by bank."""
        return {b.key: self.state[f"{self.at}/params/{b.key}"] for b in self.layout.banks}

    def check_in_place(self) -> None:
        """RuntimeError naming the first parameter that is no longer the view into its bank that it was made."""
        for name, place in self._places.items():
            if not self.members[name].is_set_to(place):
                raise RuntimeError(
                    f"{name} {list(place.shape)} was rebound (.data = …, .to(), .half()) after the optimizer's first "
                    f"step; the optimizer still updates the old memory. Copy into it (parameter.copy_), or let the "
                    f"optimizer take the parameters up where they now lie: "
                    f"optimizer.load_state_dict(optimizer.state_dict())."
                )

    @property
    def in_place(self) -> bool:
        """Whether every parameter is still the view into its bank."""
        return all(self.members[n].is_set_to(place) for n, place in self._places.items())

    def note_versions(self) -> None:
        """Remember the parameters as they now are, for `written`."""
        if self.moves:
            self._versions = {n: p._version for n, p in self.members.items()}

    def written(self) -> str | None:
        """The first parameter that somebody wrote in place since `note_versions`, where the parameters hold y."""
        return next((n for n, v in self._versions.items() if self.members[n]._version != v), None)

    def show(self, evaluating: bool) -> None:
        """Put x into the model's parameters (`evaluating`) or the point at which gradients are taken."""
        point = self.params
        move = self.transform.gradient_point
        if move is not None and not evaluating:
            point = move(point, self.optimizer(self.state), Context(self.numbers(self.state)))
        for bank in self.layout.banks:
            if self.apart(bank):
                self.state[f"{self.at}/module/{bank.key}"].copy_(point[bank.key])
        torch.autograd.graph.increment_version(list(self.members.values()))
        self.note_versions()

    def adopt_written(self) -> None:
        """Where somebody wrote into parameters that held x, what they wrote is x."""
        for bank in self.layout.banks:
            if self.apart(bank):
                x, shown = self.state[f"{self.at}/params/{bank.key}"], self.state[f"{self.at}/module/{bank.key}"]
                x.copy_(torch.where(x.to(bank.dtype) == shown, x, shown.to(x.dtype)))

    # ------------------------------------------------------------------ what a step is given

    def optimizer(self, state: Tensors) -> Any:
        """The transform's own state out of the flat one."""
        return flat_tree.unflatten(self.form, state)

    def numbers(self, state: Tensors) -> dict[str, Tensor]:
        return self.hyperparameters.by_name(state[f"{self.at}/hyperparameters"])

    def gather(self, gradients: Tensors) -> Tensors:
        """Gradients by parameter as new banks in the parameters' dtype; a missing one is zero."""
        zeros = {b.dtype: torch.zeros((), dtype=b.dtype, device=self.layout.device) for b in self.layout.banks}
        named = {n: gradients.get(n, zeros[p.dtype].expand(p.shape)) for n, p in self.members.items()}
        return {f"{self.at}/{k}": b for k, b in self.layout.join(named, in_state_dtype=False).items()}

    def present(self, missing: frozenset[str]) -> Tensors:
        """Which entries of a flat bank, which matrices of a stacked one, belong to parameters that have a gradient."""
        if self._present is None or self._present[0] != missing:
            one = torch.ones((), device=self.layout.device)
            named = {n: (0 * one if n in missing else one).expand(p.shape) for n, p in self.members.items()}
            joined = self.layout.join(named)
            masks = {k: (b if b.ndim == 1 else b.flatten(1)[:, 0]) > 0 for k, b in joined.items()}
            self._present = (missing, {f"{self.at}/{k}": m for k, m in masks.items()})
        return self._present[1]

    def bank_of(self, key: str) -> str | None:
        """The bank to which the state tensor `key` belongs; None for a plain number."""
        return next((b.key for b in self.layout.banks if key.endswith(f"/{b.key}")), None)

    # ------------------------------------------------------------------ state by parameter

    def parts(self, state: Tensors | None = None) -> dict[str, dict[str, Tensor]]:
        """Views of all state by parameter: ``{"blocks.0.weight": {"0.mu": …}}``, the optimizer's own weights as ``x``
        (where the model may hold y) or ``master``. Numbers that all parameters share are in each."""
        named: dict[str, dict[str, Tensor]] = {n: {} for n in self.members}
        for part, bank, tensor in self._kept(self.state if state is None else state):
            by_name = ((n, tensor) for n in named) if bank is None else self.layout.by_name(bank, tensor)
            for name, view in by_name:
                named[name][part] = view
        return named

    def _kept(self, state: Tensors) -> Iterator[tuple[str, str | None, Tensor]]:
        """``(part, bank or None, tensor)`` of all that a checkpoint needs."""
        for path, tensor in state.items():
            section, _, rest = path.partition("/")[2].partition("/")
            if section == "params" and f"{self.at}/module/{rest}" in state:
                yield "x" if self.moves else "master", rest, tensor
            elif section == "optimizer":
                bank = self.bank_of(rest)
                part = rest if bank is None else rest.removesuffix(f"/{bank}")
                yield part.replace("/", "."), bank, tensor

    def problems(self, saved: Mapping[str, Parts], *, complete: bool = True) -> list[str]:
        """What of `saved` does not fit, in words; parameters that are not in it are none. `complete`: each parameter
        that is in it must have all its parts."""
        said = []
        for name, wanted in self.parts().items():
            if (given := saved.get(name)) is None:
                continue
            if complete:
                said += [f"missing {part} of {name}" for part in wanted if part not in given]
                said += [f"unexpected {part} of {name}" for part in given if part not in wanted]
            said += [
                f"mismatched {part} of {name}: {list(given[part].shape)} in the checkpoint, {list(t.shape)} here"
                for part, t in wanted.items()
                if part in given and given[part].shape != t.shape
            ]
        return said

    def load(self, saved: Mapping[str, Parts]) -> None:
        """Copy `saved` into place; what is not in it begins anew. Numbers that all share are its first parameter's.
        `saved` may be the group's own state."""
        own = self.parts()
        complete = all(part in saved.get(n, ()) for n, parts in own.items() for part in parts)
        fresh = {} if complete else self.parts({**self.state, **self._begun()})
        done: set[int] = set()
        for source in (saved, fresh):
            for name, given in source.items():
                for part, tensor in own.get(name, {}).items():
                    # Views of parameters are made for this call; the numbers that all share are one tensor.
                    if part in given and id(tensor) not in done:
                        tensor.copy_(given[part])
                        done.add(id(tensor))

    def reset(self) -> None:
        """Forget all but the weights."""
        for path, tensor in self._begun().items():
            self.state[path].copy_(tensor)

    def _begun(self) -> Tensors:
        return dict(flat_tree.flatten(self.transform.init(self.params), f"{self.at}/optimizer"))
