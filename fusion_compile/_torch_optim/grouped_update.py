"""The parameter groups of a torch optimizer, updated together: which take part in a step, and with which numbers.

``param_groups`` and ``state`` belong to the optimizer and come with each call, because torch, its schedulers and users
write into them. Wrappers (Lightning's) copy the optimizer's attributes, so nothing that changes is kept there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._say_once import SayOnce
from fusion_compile._state.banks import build_layout
from fusion_compile._state.groups import refuse_unread
from fusion_compile._state.kept_average import KeptAverage
from fusion_compile._state.mismatches import refuse_mismatches
from fusion_compile._state.routing import Route
from fusion_compile._step.numbers_used import numbers_used
from fusion_compile._torch_optim.averages import bind_averages
from fusion_compile._torch_optim.group_counts import GroupCounts
from fusion_compile._torch_optim.group_numbers import as_float, check_number, number_at
from fusion_compile._torch_optim.group_record import GroupRecord, gradients_of, names_in
from fusion_compile._torch_optim.guards import Guards
from fusion_compile._torch_optim.named_groups import STEPS, check_options, check_parameters, group_routes
from fusion_compile._torch_optim.naming import full_names, undecided
from fusion_compile._torch_optim.parameter_group import ParameterGroup, holder
from fusion_compile._torch_optim.run_programs import RunPrograms
from fusion_compile._torch_optim.several_ranks import agree_on, begins_step, refuse_spread, without_data
from fusion_compile._torch_optim.sharded_group import ShardedGroup
from fusion_compile._torch_optim.torch_words import (
    BETAS,
    MAXIMIZE,
    betas_of,
    decay_is_theirs,
    points_of,
    split_betas,
    without_torchs_words,
)
from fusion_compile._torch_optim.update_program import Arrivals, Signature, Turn, UpdatePrograms, as_minimized
from fusion_compile._types import Tensors
from fusion_compile.optim._resolve import OptimizerChoice
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import SPECTRAL, Transform, bound

Options: TypeAlias = dict[str, Any]
"""One of ``param_groups``."""
State: TypeAlias = MutableMapping[Any, Any]
"""``optimizer.state``: from a group's first step on, views of everything that is kept of each parameter."""


class Released(Protocol):
    """What updates parameters as their gradients arrive (`released_gradients`)."""

    def close(self) -> None:
        """End the step that arrivals began."""


REMEDY = "Build the optimizer with the model and recipe that saved it."


@dataclass
class GroupedUpdate:
    """Everything that a torch optimizer is besides its ``param_groups`` and ``state``.

    `source`: what `transform` was made of; all but a transform itself can be pickled. `numbers`: the defaults of its
    hyperparameters. `records`: one for each group. `kept`: for how many parameters there was state when it was last
    shown; less means that the user dropped some. `loads`: how often a state was loaded. `averages`: moving averages of
    the weights, of which `transform` knows.
    """

    source: OptimizerChoice
    transform: Transform
    numbers: Mapping[str, float | Schedule]
    programs: UpdatePrograms
    force_scalar: tuple[str, ...]
    force_spectral: tuple[str, ...]
    model: nn.Module | None = None
    half_precision: str = "master"
    known_routes: dict[str, Route] = field(default_factory=dict)
    records: list[GroupRecord] = field(default_factory=list)
    evaluating: bool = False
    released: Released | None = None
    loss: Any = None
    kept: int = 0
    loads: int = 0
    averages: tuple[KeptAverage, ...] = ()
    warn: SayOnce = field(default_factory=SayOnce)
    guards: Guards = field(init=False)
    runs: RunPrograms = field(init=False)
    counts: GroupCounts = field(default_factory=GroupCounts)

    def __post_init__(self) -> None:
        self.runs = RunPrograms(self.programs)
        self.guards = Guards(self.warn, self._after_load, points_of(self.transform))

    @property
    def moves(self) -> bool:
        """Whether parameters hold another point while training than the deployed one."""
        return self.transform.gradient_point is not None

    def groups(self) -> Iterator[ParameterGroup]:
        """The groups that have taken a step."""
        return (record.group for record in self.records if record.group is not None)

    @property
    def betas(self) -> tuple[str, ...]:
        """Names of the hyperparameters that a group's ``betas`` stands for."""
        return betas_of(self.transform)

    # ------------------------------------------------------------------ groups come to be

    def read_group(self, group: Options, param_groups: list[Options]) -> tuple[Options, list[str]]:
        """Check a group that joins `param_groups`. Return it as torch.optim takes it, and its parameters' names."""
        at, of = len(param_groups), f"parameter group {len(param_groups)}"
        known = names_in(self.records, param_groups)
        given = group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        check_parameters(given, at, {id(p): n for n, p in known.items()})
        group = split_betas(without_torchs_words({**group, "params": given}, of), self.betas, of)
        check_options(group, at, self.transform)
        for name in self.numbers.keys() & group.keys():
            check_number(at, name, group[name])
        names = full_names(given, at, known, self.model)
        self._say_of_plain(names, at)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        self.refuse_unread(at, group, dict(zip(names, tensors, strict=True)))
        # torch.optim wants names for all groups or for none.
        named = "param_names" in param_groups[0] if param_groups else any(isinstance(e, tuple) for e in given)
        group["params"] = list(zip(names, tensors, strict=True)) if named else tensors
        return group, names

    def _say_of_plain(self, names: list[str], at: int) -> None:
        if SPECTRAL in self.transform.roles and undecided(names, self.force_scalar + self.force_spectral):
            self.warn(
                "plain",
                f"parameter group {at} has parameters without names, and {self.transform.name} treats matrices and "
                f"embeddings apart: only their shapes tell which are which, so an embedding or a last layer counts as "
                f"a matrix. Give the model (model=…), or model.named_parameters().",
            )

    def new_group(self, at: int, options: Options, also: Iterable[str] = ()) -> ParameterGroup:
        """Put the trainable parameters of a group, and those named in `also`, into banks, with a fresh state."""
        record = self.records[at]
        wanted = {*also, *(record.group.covers if record.group is not None else ())}
        named = zip(record.names, options["params"], strict=True)
        members = {n: p for n, p in named if p.requires_grad or n in wanted}
        patterns = (self.force_scalar, self.force_spectral)
        routes = group_routes(members, self.model, self.known_routes, self.transform, *patterns)
        numbers = {n: as_float(options[n]) for n in self.numbers}
        devices = {group.at: group.layout.device for group in self.groups()}
        for name, p in members.items():
            other = next((i for i, device in devices.items() if i != at and device != p.device), None)
            if other is not None:
                raise ValueError(
                    f"{name} of parameter group {at} lies on {p.device}, parameter group {other} on {devices[other]}; "
                    f"one program updates them all. Move them to one device, or make an optimizer for each."
                )
        if any(_compat.is_spread_over_devices(p) for p in members.values()):
            refuse_spread(self, members)
            return ShardedGroup(at, members, routes, self.transform, numbers, self.half_precision)
        averages = [kept.average for kept in self.averages]
        return ParameterGroup(at, members, routes, self.transform, numbers, self.half_precision, averages)

    def refuse_unread(self, at: int, options: Options, given: Mapping[str, nn.Parameter]) -> None:
        """Raise ValueError for a number that the new group `at` sets and nothing reads for its parameters.

        A number that is the default's, as in a copy of other ``param_groups``, sets nothing. A ``weight_decay`` that
        has another name for these parameters gets it.
        """
        members = {n: p for n, p in given.items() if p.requires_grad}
        if not members or not self.numbers.keys() & options.keys():
            return
        decay_is_theirs(options, used := self._numbers_used(members))
        set_here = {n: options[n] for n in self.numbers if n in options}
        if differing := [n for n, value in set_here.items() if as_float(value) != as_float(self.numbers[n])]:
            refuse_unread(f"parameter group {at}", differing, used, self.transform.name)

    def refuse_unread_rate(self, param_groups: Iterable[Options]) -> None:
        """Raise ValueError if nothing reads ``lr`` for any parameter, so that giving it would change nothing."""
        members = {n: p for n, p in names_in(self.records, param_groups).items() if p.requires_grad}
        if members:
            refuse_unread("the optimizer", ["lr"], self._numbers_used(members), self.transform.name)

    def _numbers_used(self, members: Mapping[str, nn.Parameter]) -> frozenset[str]:
        """Names of the numbers that are used for `members`; all where that cannot be found out."""
        patterns = (self.force_scalar, self.force_spectral)
        routes = group_routes(members, self.model, {}, self.transform, *patterns)
        layout = build_layout(holder(without_data(members)), routes, alignment=self.transform.extras.alignment)
        used = numbers_used(bound(self.transform, layout.infos), layout.without_data())
        return frozenset(self.numbers) if used is None else used

    def build(self, at: int, options: Options, state: State, also: Iterable[str] = ()) -> ParameterGroup:
        """Build a group again and load what `state` has of its parameters."""
        former = self.records[at].group
        group = self.new_group(at, options, also)
        if saved := group.saved_in(state, former):
            refuse_mismatches(group.problems(saved, complete=False), REMEDY)
            with torch.no_grad():
                group.load_saved(saved)
        self.adopt(group, options, state)
        return group

    def adopt(self, group: ParameterGroup, options: Options, state: State) -> None:
        """Make `group` the one that is updated, and show its tensors in `state`."""
        record = self.records[group.at]
        if record.group is not group:
            self.programs.forget()
            self.runs.forget()
            record.group = group
        if group.moves:
            self.apply_numbers(group, options)
            if self.evaluating or options[STEPS] > 0:  # before the first step y is x
                with torch.no_grad():
                    group.show(self.evaluating)
            self.guards.cover(group.covers, self.model)
            self.guards.switch(not self.evaluating and options[STEPS] > 0)
        bind_averages(self.averages, group)
        for p, parts in group.shown().items():
            state.setdefault(p, {}).update(parts)  # beside what others keep there
        self.kept = len(state)

    # ------------------------------------------------------------------ a step

    def update(self, param_groups: list[Options], state: State, loss: Any) -> None:
        """Update every parameter that has a gradient. Without any gradient nothing happens."""
        if self.released is not None:
            return self.released.close()
        groups: dict[int, ParameterGroup] = {}
        turns, updated, gradients, present, in_runs = [], [], {}, {}, {}
        dropped = self.has_lost(state)
        pairs = [(r, options, r.pairs(options)) for r, options in zip(self.records, param_groups, strict=True)]
        arrived = [gradients_of(named) for _, _, named in pairs]
        if not begins_step(self, param_groups, arrived, dropped=dropped):
            for at, given in enumerate(arrived):
                if given:
                    self.ready(at, param_groups[at], state, given, dropped)
            return
        for at, ((_, options, named), given) in enumerate(zip(pairs, arrived, strict=True)):
            idle = not given and bool(self.averages) and any(arrived) and any(p.requires_grad for _, p in named)
            if not given and not idle:
                continue
            group = self.ready(at, options, state, given, dropped)
            self.apply_numbers(group, options)
            groups[at] = group
            if idle:
                turns.append(Turn(at, due=False, partial=False, idle=True))
                continue
            updated += group.holders(list(given))
            missing = self.counts.missing(group, given, self.warn)
            if group.takes_runs(missing):
                in_runs[at] = given
                continue
            due = group.transform.period > 0 and options[STEPS] % group.transform.period == 0
            turns.append(Turn(at, due, bool(missing)))
            gradients.update(group.gather(given, uphill=bool(options.get(MAXIMIZE))))
            if missing:
                present.update(group.present(missing))
        if not groups:
            return
        uphill = {at: bool(param_groups[at].get(MAXIMIZE)) for at in groups}
        loss = as_minimized(loss, uphill.values(), next(iter(groups.values())).layout)
        if turns:
            signature = Signature(tuple(turns), loss is not None)
            self.programs.step(groups, signature, Arrivals(gradients, present, loss))
        for at, given in in_runs.items():
            self.runs.step(groups[at], self.transform, self.half_precision, given, uphill=uphill[at], loss=loss)
        for average in self.averages:
            average.bound()
            average.say_written()
        for at in (*in_runs, *(turn.at for turn in turns if not turn.idle)):
            param_groups[at][STEPS] += 1
            self.programs.after_step(groups[at], param_groups[at][STEPS])
        torch.autograd.graph.increment_version(updated)
        for group in groups.values():
            group.note_versions()
            group.publish()
        self.guards.switch(self.moves)

    def has_lost(self, state: State) -> bool:
        """Whether somebody dropped state (``state.clear()``, ``del state[p]``), without a look at each parameter."""
        return len(state) < self.kept or any(not group.kept_in(state, 1) for group in self.groups())

    def ready(self, at: int, options: Options, state: State, given: Tensors, dropped: bool) -> ParameterGroup:
        """Return the group with all parameters of `given` in place. `dropped`: some parameter's state is gone."""
        group = self.records[at].group
        if group is not None:
            written = group.take_back()
            kept = group.kept_in(state) if dropped else group.covers.keys()
            if len(kept) < len(group.covers):
                with torch.no_grad():
                    group.load({n: parts for n, parts in group.parts().items() if n in kept})
                options[STEPS] = options[STEPS] if kept else 0
                self.adopt(group, options, state)
            self._notice_written(group, options, written)
            group.forget_lost_of_written()
        if group is None or not given.keys() <= group.covers.keys():
            group = self.build(at, options, state, given)
        return group

    def _after_load(self) -> None:
        """The model's weights were loaded after the optimizer's: where they are x, put y there for the forward."""
        if self.moves and not self.evaluating:
            for group in self.groups():
                group.show_where_average()

    def _notice_written(
        self, group: ParameterGroup, options: Options, rebound: str | None, *, look: bool = False
    ) -> None:
        """Take up what the user wrote into parameters that hold y; elsewhere a write needs no notice.

        `rebound`: one rebound to other values. `look`: for writes that nothing tells, too.
        """
        name, steps, point = rebound or group.written(), options[STEPS], group.written_point
        if steps == 0:
            if name is not None:
                with torch.no_grad():
                    group.load({})
                group.note_versions()
            return
        if not group.moves or not (point.is_due(steps) or look or name is not None):
            return
        with torch.no_grad():
            said = point.take_up(group.plan, group.state, group.members, steps, told=name)
        group.note_versions()
        if said:
            self.warn("written", said)

    def apply_numbers(self, group: ParameterGroup, options: Options) -> None:
        """Write the numbers of ``param_groups`` and the values of schedules to the device where they changed."""
        record = self.records[group.at]
        self._apply_betas(group, options, record.seen)
        given = {n: record.read(n, options[n]) for n in record.seen}
        changed = {n for n, value in given.items() if value != record.seen[n]}
        for name in changed:
            group.hyperparameters.check(name, given[name])
        for name in changed:
            record.schedules.pop(name, None)
            if callable(given[name]):
                record.schedules[name] = given[name]
        still = [n for n in record.seen if n.endswith("_lr") and n not in changed and n not in record.schedules]
        if "lr" in changed and still:
            name = self.transform.name
            self.warn(
                "lr",
                f"lr was set to {given['lr']:g}, but {', '.join(still)} stayed: torch's schedulers write only 'lr'. "
                f"Give {still[0]} a schedule of its own ({name}({still[0]}=optim.cosine(…))), or write it into "
                f"param_groups beside lr.",
            )
        for name, schedule in record.schedules.items():
            given[name] = number_at(options[STEPS], name, schedule)
        options.update({n: given[n] for n in record.schedules})
        group.hyperparameters.update(given)
        record.seen = given
        if self.betas:
            options[BETAS] = tuple(given[n] for n in self.betas)

    def _apply_betas(self, group: ParameterGroup, options: Options, seen: Mapping[str, Any]) -> None:
        """Take over what was written into a group's ``betas``. A number that was written itself counts more."""
        names = self.betas
        if not names or BETAS not in options or options[BETAS] == tuple(seen[n] for n in names):
            return
        told = split_betas({BETAS: options[BETAS]}, names, f"parameter group {group.at}")
        told = {n: value for n, value in told.items() if value != seen[n] and options[n] == seen[n]}
        for name, value in told.items():
            group.hyperparameters.check(name, value)
        options.update(told)
        if names[0] in told and names[0] != "beta1":
            meant = "the momentum of matrices" if names[0] == "momentum" else "Schedule-Free's place of the gradient"
            self.warn(
                "betas",
                f"betas was written, as OneCycleLR and CyclicLR do; its first is {names[0]} here, {meant}, for which "
                f"a cycle of Adam's momentum was not made. Give the scheduler cycle_momentum=False.",
            )

    def show(self, param_groups: list[Options], evaluating: bool) -> None:
        """Change what the parameters hold: x (`evaluating`) or the point at which gradients are taken."""
        if self.released is not None:
            self.released.close()
        if self.evaluating is evaluating:
            self.guards.settle()
            return
        agree_on(self, param_groups, "eval()" if evaluating else "train()")
        self.evaluating = evaluating
        for group in self.groups():
            if group.moves:
                written = group.take_back()
                self.apply_numbers(group, param_groups[group.at])
                if evaluating:
                    self._notice_written(group, param_groups[group.at], written, look=True)
                with torch.no_grad():
                    if not evaluating:
                        group.adopt_written()
                    group.show(evaluating)
        self.guards.switch(not evaluating and any(param_groups[group.at][STEPS] for group in self.groups()))
