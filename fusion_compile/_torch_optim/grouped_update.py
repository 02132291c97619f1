"""The parameter groups of a torch optimizer, updated together: who takes part in a step, and with which numbers.

``param_groups`` and ``state`` are those of the optimizer and come with each call: torch, its schedulers and its users
write into them, and wrappers (Lightning's) copy the optimizer's attributes, so that nothing that changes may lie there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fusion_compile._state.routing import Route
from fusion_compile._torch_optim.named_groups import STEPS, group_routes
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile._torch_optim.update_program import Arrivals, Signature, Turn, UpdatePrograms
from fusion_compile._types import Tensors
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform

Options: TypeAlias = dict[str, Any]
"""One of ``param_groups``."""
State: TypeAlias = MutableMapping[Any, Any]
"""``optimizer.state``: from a group's first step on, views of all that is kept of each parameter."""
Source: TypeAlias = "str | Transform | Callable[[], Transform]"
"""What a transform is made of; all but a transform itself can be pickled."""


@dataclass
class Host:
    """What belongs to one of ``param_groups`` and is no number. `seen`: the numbers as they were last read."""

    names: list[str]
    schedules: dict[str, Schedule]
    seen: dict[str, Any]
    group: ParameterGroup | None = None


@dataclass
class GroupedUpdate:
    """All that a torch optimizer is besides its ``param_groups`` and ``state``; one `Host` for each group."""

    source: Source
    transform: Transform
    programs: UpdatePrograms
    force_scalar: tuple[str, ...]
    force_spectral: tuple[str, ...]
    model: nn.Module | None = None
    known_routes: dict[str, Route] = field(default_factory=dict)
    hosts: list[Host] = field(default_factory=list)
    evaluating: bool = False
    loss: Any = None
    warned: set[str] = field(default_factory=set)

    @property
    def moves(self) -> bool:
        """Whether parameters hold another point while training than the one that is deployed."""
        return self.transform.gradient_point is not None

    def groups(self) -> Iterator[ParameterGroup]:
        """Those that have taken a step."""
        return (host.group for host in self.hosts if host.group is not None)

    def warn_once(self, about: str, sentence: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(sentence, stacklevel=4)

    # ------------------------------------------------------------------ groups come to be

    def new_group(self, at: int, options: Options, also: Iterable[str] = ()) -> ParameterGroup:
        """The trainable parameters of a group, and those named in `also`, in banks, with a state that begins anew."""
        host = self.hosts[at]
        wanted = {*also, *(host.group.members if host.group is not None else ())}
        named = zip(host.names, options["params"], strict=True)
        members = {n: p for n, p in named if p.requires_grad or n in wanted}
        patterns = (self.force_scalar, self.force_spectral)
        routes = group_routes(members, self.model, self.known_routes, self.transform, *patterns)
        numbers = {n: as_float(options[n]) for n in self.transform.hyperparameters}
        devices = {group.at: group.layout.device for group in self.groups()}
        for name, p in members.items():
            other = next((i for i, device in devices.items() if i != at and device != p.device), None)
            if other is not None:
                raise ValueError(
                    f"{name} of parameter group {at} lies on {p.device}, parameter group {other} on {devices[other]}; "
                    f"one program updates them all. Move them to one device, or make an optimizer for each."
                )
        return ParameterGroup(at, members, routes, self.transform, numbers)

    def build(self, at: int, options: Options, state: State, also: Iterable[str] = ()) -> ParameterGroup:
        """A new group that goes on with what `state` has of its parameters."""
        former = self.hosts[at].group
        group = self.new_group(at, options, also)
        # Of the numbers that all share those count with which the group has been stepping.
        names = dict.fromkeys([*(former.members if former is not None else ()), *group.members])
        if saved := {n: dict(state[group.members[n]]) for n in names if state.get(group.members[n])}:
            refuse(group.problems(saved, complete=False))
            with torch.no_grad():
                group.load(saved)
        self.adopt(group, options, state)
        return group

    def adopt(self, group: ParameterGroup, options: Options, state: State) -> None:
        """Make `group` the one that is updated, and what it keeps the `state` that people see."""
        host = self.hosts[group.at]
        if host.group is not group:
            self.programs.forget()
            host.group = group
        if group.moves:
            self.apply_numbers(group, options)
            with torch.no_grad():
                group.show(self.evaluating)
        for name, parts in group.parts().items():
            state[group.members[name]] = parts

    # ------------------------------------------------------------------ a step

    def update(self, param_groups: list[Options], state: State, loss: Any) -> None:
        """One update of every parameter that has a gradient; nothing at all where none has."""
        groups: dict[int, ParameterGroup] = {}
        turns, updated = [], []
        gradients, present = {}, {}
        for at, (host, options) in enumerate(zip(self.hosts, param_groups, strict=True)):
            given = gradients_of(zip(host.names, options["params"], strict=True))
            if not given:
                continue
            group = self._ready(at, options, state, given)
            self.apply_numbers(group, options)
            missing = frozenset(group.members) - given.keys()
            due = group.transform.period > 0 and options[STEPS] % group.transform.period == 0
            turns.append(Turn(at, due, bool(missing)))
            groups[at] = group
            gradients.update(group.gather(given))
            if missing:
                present.update(group.present(missing))
            updated += [group.members[n] for n in given]
        if not groups:
            return
        layout = next(iter(groups.values())).layout
        if loss is not None:
            loss = torch.as_tensor(loss, device=layout.device).detach().to(layout.state_dtype).reshape(())
        signature = Signature(tuple(turns), loss is not None)
        self.programs.step(groups, signature, Arrivals(gradients, present, loss))
        for at, group in groups.items():
            param_groups[at][STEPS] += 1
            self.programs.after_step(group, param_groups[at][STEPS])
        torch.autograd.graph.increment_version(updated)
        for group in groups.values():
            group.note_versions()

    def _ready(self, at: int, options: Options, state: State, given: Tensors) -> ParameterGroup:
        """The group with all parameters of `given` in place."""
        group = self.hosts[at].group
        if group is not None:
            group.check_in_place()
            if not any(p in state for p in group.members.values()):  # optimizer.state.clear()
                group.reset()
                options[STEPS] = 0
                self.adopt(group, options, state)
        if group is None or not given.keys() <= group.members.keys():
            group = self.build(at, options, state, given)
        return group

    def apply_numbers(self, group: ParameterGroup, options: Options) -> None:
        """Write the numbers of ``param_groups``, and what schedules say, to the device where they changed."""
        host = self.hosts[group.at]
        changed = {n for n, seen in host.seen.items() if options[n] is not seen and options[n] != seen}
        for name in changed & host.schedules.keys():
            del host.schedules[name]
        still = [n for n in host.seen if n.endswith("_lr") and n not in changed and n not in host.schedules]
        if "lr" in changed and still:
            name = self.transform.name
            self.warn_once(
                "lr",
                f"lr was set to {options['lr']:g}, but {', '.join(still)} stayed: torch's schedulers write only 'lr'. "
                f"Give {still[0]} a schedule of its own ({name}({still[0]}=optim.cosine(…))), or write it into "
                f"param_groups beside lr.",
            )
        for name, schedule in host.schedules.items():
            options[name] = float(schedule(options[STEPS]))
        for name in host.seen:
            group.hyperparameters[name] = as_float(options[name])
            host.seen[name] = options[name]

    def show(self, param_groups: list[Options], evaluating: bool) -> None:
        """Change what the parameters hold: x (`evaluating`) or the point at which gradients are taken."""
        if self.evaluating is evaluating:
            return
        self.evaluating = evaluating
        for group in self.groups():
            if group.moves:
                group.check_in_place()
                self.apply_numbers(group, param_groups[group.at])
                with torch.no_grad():
                    if not evaluating:
                        group.adopt_written()
                    group.show(evaluating)


def gradients_of(named: Iterable[tuple[str, nn.Parameter]]) -> Tensors:
    """The gradients there are, by parameter. RuntimeError for one that no bank holds."""
    found = {}
    for name, p in named:
        if (g := p.grad) is None:
            continue
        if g.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of {name} {list(p.shape)} is sparse ({g.layout}); make it dense "
                f"(nn.Embedding(sparse=False)), or give the parameter to torch.optim.SparseAdam."
            )
        if g.dtype != p.dtype or g.device != p.device:
            raise RuntimeError(
                f"the gradient of {name} {list(p.shape)} is {g.dtype} on {g.device}, the parameter {p.dtype} on "
                f"{p.device}; convert it before optimizer.step()."
            )
        found[name] = g
    return found


def as_float(value: Any) -> Any:
    """A number of any make as a float, a schedule as its first value; what is neither is refused where it is used."""
    if callable(value):
        return float(value(0))
    return value if isinstance(value, Tensor | str | bool) or not hasattr(value, "__float__") else float(value)


def refuse(problems: list[str]) -> None:
    """ValueError with `problems`, if there are any."""
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"the checkpoint is of another model or optimizer; nothing was loaded:\n  {shown}{more}\n"
            f"Build the optimizer with the model and recipe that saved it."
        )


def names_in(hosts: Iterable[Host], param_groups: Iterable[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """All parameters by name."""
    pairs = zip(hosts, param_groups, strict=True)
    return {n: p for host, options in pairs for n, p in zip(host.names, options["params"], strict=True)}
