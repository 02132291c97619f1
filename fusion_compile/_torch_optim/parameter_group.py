"""One parameter group of a torch optimizer as flat state: banks of its parameters, the transform's state, the numbers.

Keys are those of a training step (``_state.keys``). The parameters themselves are views into the ``module`` banks.
``params`` is another bank where the optimizer works on other weights than the model holds: the fp32 master of a
half-precision parameter, or x where the parameters hold the gradient point y.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._state import flat_tree, keys
from fusion_compile._state.followers import stay
from fusion_compile._state.half_precision import entries, forget_lost, keeps_lost, noise_for, refuse_banks, weights_of
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.masters import rounded, with_written_weights
from fusion_compile._state.mismatches import mismatches
from fusion_compile._state.named_state import kept_parts
from fusion_compile._state.residence import Residence
from fusion_compile._state.routing import Route
from fusion_compile._step.planned import banks_for
from fusion_compile._step.update import UpdatePlan
from fusion_compile._torch_optim.gradient_banks import GradientBanks
from fusion_compile._torch_optim.piecewise import COLUMNS, is_piecewise
from fusion_compile._torch_optim.runs import large_first
from fusion_compile._torch_optim.samples import Samples
from fusion_compile._torch_optim.written_point import WrittenPoint
from fusion_compile._types import Tensors
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform
from fusion_compile.optim.averaged import Average

OWN_WEIGHTS = {"x", "master"}
"""Parts that are the optimizer's own weights, where the model may hold others."""
Parts = Mapping[str, Tensor]
"""The optimizer's state of one parameter, by name: ``{"0.mu": [m, n], "0.count": 0-dim, …}``."""


class Holder(nn.Module):
    """A module that is only a collection of parameters, and never runs."""


def holder(members: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module whose ``named_parameters()`` are `members`, whatever their names look like."""
    module = Holder()
    module._parameters.update(members)  # register_parameter() refuses the dots that full names have
    return module


class ParameterGroup:
    """The trainable parameters of one group in banks, with everything that their update needs. `at`: its index.

    `covers`: the parameters as people have them, by the same names; `members` are what this group updates in their
    place. `plan`: its update. `piecewise`: it is taken run by run, without banks of
    gradients. `moves`: the parameters hold the gradient point while training. `state`: all tensors;
    `shared_state`: the same under keys that a program of several groups shares.
    """

    def __init__(
        self,
        at: int,
        members: Mapping[str, nn.Parameter],
        routes: tuple[Route, ...],
        transform: Transform,
        numbers: Mapping[str, float | Schedule],
        half_precision: str = "master",
        averages: Sequence[Average] = (),
    ) -> None:
        module = holder(members)
        self.at, self.members, self.routes = at, dict(members), routes
        self.covers = self.members
        self.averages = tuple(averages)
        self.piecewise = self._is_piecewise(transform, half_precision)
        ordered = large_first(routes, members) if self.piecewise else routes
        alignment = COLUMNS if self.piecewise else 1
        self.layout, self.transform = layout, _ = banks_for(transform, module, ordered, half_precision, alignment)
        self.moves = self.transform.gradient_point is not None
        refuse_banks(half_precision, layout)
        half = next((b for b in layout.banks if b.dtype != layout.state_dtype), None)
        if self.moves and half_precision != "master" and half is not None:
            raise ValueError(
                f"half_precision={half_precision!r}: while {transform.name} trains in a torch optimizer, {half.dtype} "
                f"parameters hold the point of the gradient, and its weights lie in an fp32 bank of their own. That "
                f"bank is the master: 'exact' and 'kahan' would take as many bytes, and 'stochastic' and 'round' would "
                f"keep weights that nobody sees less exactly. Use 'master', or compile_training_step, where the "
                f"parameters hold the weights."
            )
        self.hyperparameters = Hyperparameters(numbers, layout.device, layout.state_dtype)
        banks = Residence(module, layout).banks
        self._places = {n: stay(p.detach()) for n, p in self.members.items()}
        self._versions: dict[str, int] = {}
        self._gradients = GradientBanks(layout)
        self._present: tuple[frozenset[str], Tensors] | None = None

        self.state: Tensors = {keys.HYPERPARAMETERS: self.hyperparameters.tensor}
        self.state.update(entries(half_precision, layout, banks))
        for bank in layout.banks if self.moves else ():
            self.state[keys.module(bank.key)] = banks[bank.key]
            self.state[keys.params(bank.key)] = banks[bank.key].to(layout.state_dtype, copy=True)
        optimizer = self.transform.init({b.key: weights_of(b, self.state) for b in layout.banks})
        form = flat_tree.form(optimizer, keys.OPTIMIZER)
        noise = noise_for(half_precision, layout, banks)
        self.plan = UpdatePlan(layout, self.transform, form, self.hyperparameters, noise)
        self.state.update(flat_tree.flatten(optimizer, keys.OPTIMIZER))
        for tensor in self.state.values():
            _compat.mark_static(tensor)
        self.shared_state = keys.of_group(at, self.state)
        self.averaged = {
            keys.optimizer(f"averages/{a.name}/{bank.key}") for a in self.averages for bank in layout.banks
        }
        self._marks = {n: next(iter(parts), None) for n, parts in self.parts().items()}
        moving = [(b, self.state[keys.module(b.key)]) for b in layout.banks if self.moves]
        self.written_point = WrittenPoint(Samples(moving))
        self.loses = keeps_lost(self.state)
        self.note_versions()

    def _is_piecewise(self, transform: Transform, half_precision: str) -> bool:
        kinds = {(p.device.type, p.dtype == torch.float64) for p in self.members.values()}
        cuts = len(kinds) == 1 and ("cpu" in next(iter(kinds))) and half_precision != "stochastic"
        return cuts and not self.averages and is_piecewise(transform, self.routes)

    def takes_runs(self, missing: frozenset[str]) -> bool:
        """Whether a step without gradients of `missing` is taken run by run. Of weights that the optimizer keeps beside
        the model's a step takes up what was written into any, those without a gradient, too."""
        kept_beside = self.moves or any(b.dtype != self.layout.state_dtype for b in self.layout.banks)
        return self.piecewise and not (missing and kept_beside)

    # ------------------------------------------------------------------ where the weights are

    def take_back(self) -> str | None:
        """Bring every parameter that was rebound (``.data = …``) back into its bank, with the values that it has now.

        SAM puts old weights back so, and so does another optimizer that shares the parameter. Return the name of the
        first whose values differ from those in the bank. Raise RuntimeError, before anything is changed, for one that
        no longer fits: it has another shape, dtype or device.
        """
        if self.in_place:
            return None
        moved = [(n, p, place) for n, place in self._places.items() if not (p := self.members[n]).is_set_to(place)]
        for name, p, place in moved:
            if (p.shape, p.dtype, p.device, p.layout) != (place.shape, place.dtype, place.device, place.layout):
                raise RuntimeError(
                    f"{name} {list(place.shape)} {place.dtype} on {place.device} is {list(p.shape)} {p.dtype} on "
                    f"{p.device} now (.data = …, .to(), .half()), and the optimizer still updates the old memory. "
                    f"Convert before the first step, or let the optimizer take the parameters up as they are: "
                    f"optimizer.load_state_dict(optimizer.state_dict())."
                )
        written = None
        for name, p, place in moved:
            with torch.no_grad():
                if self.moves and written is None and not torch.equal(p, place):
                    written = name
                place.copy_(p.detach())
            p.data = place
            if name in self._versions and not self.loses:
                self._versions[name] = p._version  # what was compared is no other write
        return written

    @property
    def in_place(self) -> bool:
        """Whether every parameter is still the view into its bank."""
        return all(map(Tensor.is_set_to, self.members.values(), self._places.values()))

    def note_versions(self) -> None:
        """Remember the parameters' versions for `written`."""
        if self.moves or self.loses:
            self._versions = {n: p._version for n, p in self.members.items()}
        if self.moves:
            self.written_point.note()

    def note_version(self, name: str) -> None:
        """Remember one parameter's version, which an update of it alone has changed."""
        if name in self._versions:
            self._versions[name] = self.members[name]._version

    def forget_lost_of_written(self) -> None:
        """Where somebody wrote a parameter, forget what its rounding had lost."""
        if self.loses:
            forget_lost(
                self.layout, self.state, {n for n, v in self._versions.items() if self.members[n]._version != v}
            )

    def written(self) -> str | None:
        """The first parameter that the user wrote in place since `note_versions`, where the parameters hold y."""
        return next((n for n, v in self._versions.items() if self.members[n]._version != v), None)

    def show(self, evaluating: bool) -> None:
        """Put x into the model's parameters (`evaluating`) or the point at which gradients are taken."""
        plan = self.plan
        point = plan.params(self.state) if evaluating else plan.gradient_point(self.state, plan.context(self.state))
        self._write(rounded(self.layout, point, self.state))
        torch.autograd.graph.increment_version(list(self.members.values()))
        self.note_versions()

    def show_where_average(self) -> None:
        """Put y into the parameters that hold x, as a model does that was saved at x and loaded just now."""
        plan = self.plan
        x = self.layout.views(plan.params(self.state))
        y = self.layout.views(plan.gradient_point(self.state, plan.context(self.state)))
        with torch.no_grad():
            for name, p in self.members.items():
                at_y = y[name].to(p.dtype)
                if torch.equal(p, x[name].to(p.dtype)):
                    p.copy_(at_y)
                if torch.equal(p, at_y):
                    self._versions[name] = p._version

    def adopt_written(self) -> None:
        """Take what the user wrote into parameters that held x as x."""
        self._write(with_written_weights(self.layout, self.state))

    def _write(self, values: Tensors) -> None:
        for key, value in values.items():
            if value is not self.state[key]:
                self.state[key].copy_(value)

    def publish(self) -> None:
        """Show the weights as they are now to everybody who has a part of them; here they are views of them."""

    def holders(self, names: Sequence[str]) -> list[nn.Parameter]:
        """The parameters of these names whose version an update must change."""
        return [self.members[n] for n in names]

    # ------------------------------------------------------------------ what a step is given

    def gather(self, gradients: Tensors, *, uphill: bool = False) -> Tensors:
        """Copy gradients by parameter into banks in the parameters' dtype, under shared keys; a missing one is zero.

        `uphill`: with the other sign.
        """
        return keys.of_group(self.at, self._gradients.gather(self.members, gradients, uphill=uphill))

    def present(self, missing: frozenset[str]) -> Tensors:
        """Mask the entries of a flat bank and the matrices of a stacked one whose parameters have a gradient."""
        if self._present is None or self._present[0] != missing:
            one = torch.ones((), device=self.layout.device)
            named = {n: (0 * one if n in missing else one).expand(p.shape) for n, p in self.members.items()}
            joined = self.layout.join(named)
            masks = {k: (b if b.ndim == 1 else b.flatten(1)[:, 0]) > 0 for k, b in joined.items()}
            self._present = (missing, keys.of_group(self.at, masks))
        return self._present[1]

    # ------------------------------------------------------------------ state by parameter

    def parts(self, state: Tensors | None = None) -> dict[str, dict[str, Tensor]]:
        """Views of all state by parameter: ``{"blocks.0.weight": {"0.mu": …}}``.

        The optimizer's own weights are ``x`` (where the model may hold y) or ``master``. A number that all parameters
        share is in each.
        """
        named: dict[str, dict[str, Tensor]] = {n: {} for n in self.members}
        weights = "x" if self.moves else "master"  # OWN_WEIGHTS
        for part, bank, tensor in kept_parts(self.layout, self.state if state is None else state, weights):
            part = average_part(part) if self.averages else part
            by_name = ((n, tensor) for n in named) if bank is None else self.layout.by_name(bank, tensor)
            for name, view in by_name:
                named[name][part] = view
        return named

    def kept_in(self, state: Mapping[Any, Any], first: int | None = None) -> frozenset[str]:
        """Names of the members (of the `first` so many) whose own state lies in ``optimizer.state``.

        A member that has none, because the transform keeps nothing for it, counts as kept.
        """
        looked_at = itertools.islice(self._marks.items(), first)
        return frozenset(n for n, part in looked_at if part is None or part in state.get(self.covers[n], ()))

    def shown(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """What ``optimizer.state`` shows of each parameter."""
        return {self.covers[n]: parts for n, parts in self.parts().items()}

    def saved_in(self, state: Mapping[Any, Any], former: ParameterGroup | None) -> dict[str, dict[str, Any]]:
        """What ``optimizer.state`` has of the parameters by name. `former`: the group that updated them until now."""
        # The former members come first, because a number that all parameters share is loaded from the first of them.
        names = dict.fromkeys([*(former.members if former is not None else ()), *self.members])
        return {n: dict(state[self.members[n]]) for n in names if state.get(self.members[n])}

    def load_saved(self, saved: Mapping[str, Parts]) -> None:
        """Load what a checkpoint or ``optimizer.state`` has; see `load`."""
        self.load(saved)

    def problems(self, saved: Mapping[str, Parts], *, complete: bool = True) -> list[str]:
        """Compare `saved` with the group's own state: one line for each difference in names or shapes.

        Parameters that `saved` lacks make none, nor do other people's entries. `complete`: a parameter that it has must
        have all its parts.
        """
        lines: list[str] = []
        for name, wanted in self.parts().items():
            if name in saved:
                given = {part: t for part, t in saved[name].items() if part in wanted or is_a_part(part)}
                wanted = {part: t for part, t in wanted.items() if part in given or not is_of_an_average(part)}
                lines += mismatches(wanted, given, _part_of(name), complete=complete)
        return lines

    def load(self, saved: Mapping[str, Parts]) -> None:
        """Copy `saved`, which may be the group's own state, into place; what it lacks starts fresh, from the weights
        that the parameters hold. Of a number that all parameters share its first parameter's counts."""
        own = self.parts()
        complete = all(part in saved.get(n, ()) for n, parts in own.items() for part in parts)
        for name, parts in own.items():
            for weights in OWN_WEIGHTS & parts.keys() - saved.get(name, {}).keys():
                parts[weights].copy_(self.members[name].detach())
            for lost in {*keys.LOST} & parts.keys() - saved.get(name, {}).keys():
                parts[lost].zero_()
        fresh = {} if complete else self.parts({**self.state, **self.plan.fresh(self.state)})
        done: set[int] = set()
        for source in (saved, fresh):
            for name, given in source.items():
                for part, tensor in own.get(name, {}).items():
                    # A number that all parameters share is one tensor; views of parameters are new at each call.
                    if part in given and id(tensor) not in done:
                        tensor.copy_(given[part])
                        done.add(id(tensor))


def average_part(part: str) -> str:
    """The name of a part of an optimizer that keeps averages: the other parts' are those that they have without."""
    if part.startswith("base."):
        return part.removeprefix("base.")
    return f"averages_{part}" if part == "taken" or part.startswith("least.") else part


def is_of_an_average(part: str) -> bool:
    """Whether a part belongs to the averages that an optimizer keeps."""
    return part.startswith(("averages.", "averages_"))


def is_a_part(name: object) -> bool:
    """Whether an entry of ``optimizer.state[p]`` has the name of a part of a transform, ``"0.mu"``.

    Parts of other recipes have a path as their name, or the number of a place in a chain. All else is somebody else's:
    the average of an EMA hook, the weights that SAM puts back.
    """
    return isinstance(name, str) and ("." in name or name.isdigit())


def _part_of(name: str) -> Callable[[str], str]:
    return lambda part: f"{part} of {name}"
