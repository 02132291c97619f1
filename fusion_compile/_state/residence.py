"""A module whose parameters lie in banks: moving in, moving out, and the check that they still lie there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._compat import same_kinds
from fusion_compile._state._compat import others_hold
from fusion_compile._state.banks import Layout
from fusion_compile._state.elsewhere import hide, nothing_like, show
from fusion_compile._state.followers import Move, move, refuse_two_in_one_place, stay
from fusion_compile._state.half_precision import keeps_lost
from fusion_compile._state.kept_average import KeptAverage, banks_of, counter_of
from fusion_compile._state.kept_gradients import KeptGradients
from fusion_compile._types import Tensors

_requires_grad, _version = attrgetter("requires_grad"), attrgetter("_version")


class Residence:
    """The module's parameters as views into banks, and the check that they still are.

    Moving in copies every parameter into a bank and points ``parameter.data`` at its place there. The `Parameter`
    objects stay the same, so optimizers, EMA copies and hooks that hold them keep working. Each view has a storage of
    its own over its part of the bank's memory. Whatever is saved by storage (``torch.save`` of one layer, ``pickle``)
    is then that part and not the whole bank.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.layout = layout
        self._model = model
        parameters = dict(model.named_parameters())
        refuse_two_in_one_place({n: p for n, p in parameters.items() if p.requires_grad})
        self.banks: Tensors = layout.join({n: p.detach() for n, p in parameters.items()}, in_state_dtype=False)
        owners = {id(p): [] for p in parameters.values()}  # type: dict[int, list[tuple[dict[str, Any], str, str]]]
        for prefix, module in model.named_modules(remove_duplicate=False):
            for key, p in module._parameters.items():
                if p is not None and id(p) in owners:
                    owners[id(p)].append((module._parameters, key, f"{prefix}.{key}" if prefix else key))
        self._tenants = []
        self._places: list[nn.Parameter] = []
        self._versions: dict[str, int] = {}
        self._buffers: list[tuple[dict[str, Any], str, str, Tensor]] = []
        self._averages: list[KeptAverage] = []
        self._gradients: KeptGradients | None = None
        self._handed_out: dict[str, tuple[Tensor, int]] = {}
        views = layout.views(self.banks).items()
        moves = [Move(name, parameters[name], stay(torch.from_dlpack(view))) for name, view in views]  # type: ignore[attr-defined]
        self._old_memory = move(moves)
        """What numpy arrays may still read."""
        for _, p, place in moves:
            self._places.append(p)
            self._tenants += [(o, key, full, p, place) for o, key, full in owners[id(p)]]
        self._names = [*layout.views(self.banks)]
        self._frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        # What a step compares for each parameter, in lists that C walks: at 500 parameters a loop costs more than the
        # call of a captured program.
        self._owners = [owner for owner, *_ in self._tenants]
        self._keys = [key for _, key, *_ in self._tenants]
        self._at_keys = [parameter for *_, parameter, _ in self._tenants]
        self._pointers = [p.data_ptr() for p in self._places]
        self._are_like_their_places = same_kinds(self._places)
        self._absent: list[tuple[str, nn.Parameter]] = []
        self._nothing: Tensors = {}
        self._hidden = self.moved_out = False
        self.notes_writes = True
        self.note_versions()

    def keep(self, averages: Sequence[KeptAverage], state: Tensors, *, gradients: bool = False) -> None:
        """Let each of `averages` show its entries of the flat `state`.

        `gradients`: it gets entries for gradients, which the parameters' ``.grad`` show after each step.

        Raises ValueError where one is kept by another step, or was made for another model.
        """
        for ema in averages:
            views = self.layout.views(banks_of(ema.average, self.layout, state))
            ema.held_by(self._model, views, counter_of(ema.average, state))
        self._averages += averages
        self.notes_writes = keeps_lost(state)
        if gradients:
            self._gradients = KeptGradients(self._model, self.layout, state)

    def empty(self, banks: Collection[str]) -> None:
        """Free the memory of `banks`. The parameters in them then refuse to be read, until `fill`.

        Whatever lies in their memory besides (a view that user code keeps) holds what it holds; at the first time it is
        not-a-number from then on, with a warning, because it would not follow the parameter any more.
        """
        own = [bank for bank in self.layout.banks if bank.key in banks]
        names = {place.name for bank in own for place in bank.places}
        absent = [(n, p) for n, p in zip(self._names, self._places, strict=True) if n in names]
        if not self._nothing:
            self._nothing = {name: stay(nothing_like(p.detach())) for name, p in absent}
            if (kept := next((n for n, p in absent if others_hold(p, known=1)), None)) is not None:
                warnings.warn(
                    f"another tensor lies in the memory of {kept}, which is freed between steps (shard='full'): it "
                    f"holds nan from now on. Make it from the parameter inside of `with step.gathered():`.",
                    stacklevel=6,
                )
            for bank in own:
                self.banks[bank.key].fill_(float("nan"))
        self._put(self._nothing)
        for bank in own:
            self.banks[bank.key] = torch.empty(bank.shape, dtype=bank.dtype, device="meta")
        self._absent = absent
        self._hide()

    def fill(self, banks: Tensors) -> None:
        """The inverse of `empty`: let the parameters in `banks` be views into these."""
        self._show()
        self._absent = []
        self.banks |= banks
        layout = Layout(tuple(bank for bank in self.layout.banks if bank.key in banks), self.layout.device)
        self._put({n: stay(torch.from_dlpack(v)) for n, v in layout.views(banks).items()})  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, parameters whose memory was freed are what they are for torch: this package touches them alone."""
        if not self._hidden:
            yield
            return
        self._show()
        try:
            yield
        finally:
            self._hide()

    def _hide(self) -> None:
        if self._absent and not self._hidden:
            hide(self._absent)
            self._hidden = True

    def _show(self) -> None:
        if self._hidden:
            show(self._absent)
            self._hidden = False

    def _put(self, places: Mapping[str, Tensor]) -> None:
        """Point the parameters at `places`, by name."""
        at = {id(p): places[n] for n, p in zip(self._names, self._places, strict=True) if n in places}
        for p in self._places:
            if id(p) in at:
                p.data = at[id(p)]
        self._tenants = [(o, key, full, p, at.get(id(p), place)) for o, key, full, p, place in self._tenants]
        self._pointers = [p.data_ptr() for p in self._places]
        self._are_like_their_places = same_kinds(self._places)

    def note_versions(self) -> None:
        """Remember the parameters' versions for `written`."""
        self._versions = {n: p._version for n, p in zip(self._names, self._places, strict=True)}

    def written(self) -> set[str]:
        """Names of the parameters that somebody wrote in place since `note_versions`. A write through ``.data`` has no
        version and is not seen."""
        return {n for n, p in zip(self._names, self._places, strict=True) if p._version != self._versions[n]}

    def versions(self) -> int:
        """A number that grows with each write of a parameter that has a version (not through ``.data``)."""
        return sum(map(_version, self._places))

    def move_out(self) -> None:
        """Give every parameter memory of its own again, and no gradient. The banks then belong to this object
        alone."""
        if self._gradients is not None:
            self._gradients.drop()
        self.moved_out = True
        own = [place for *_, place in self._tenants]
        self._tenants = []  # they hold the memory, too
        moves = [Move(n, p, p.data.clone()) for n, p in zip(self._names, self._places, strict=True)]
        self._old_memory += move(moves, own)

    def keep_buffers(self, names: Sequence[str], assigned: Collection[str] = ()) -> Tensors:
        """Return the module's buffers `names`, which the program writes. `check` keeps them in the module from now
        on.

        Those of `assigned`, which the forward replaces, get memory of their own: who keeps the first one keeps its
        numbers.
        """
        kept: Tensors = {}
        for name in names:
            prefix, _, key = name.rpartition(".")
            owner = self._model.get_submodule(prefix)._buffers
            if name in assigned:
                owner[key] = owner[key].detach().clone()  # type: ignore[union-attr]
            kept[name] = owner[key]  # type: ignore[assignment]
            self._buffers.append((owner, key, name, kept[name]))
        return kept

    def exchange(self, buffers: Tensors) -> Tensors:
        """Put copies of `buffers`, which are of another size now, in the places of the module's, and return them."""
        for i, (owner, key, name, _) in enumerate(self._buffers):
            if name in buffers:
                owner[key] = buffers[name].detach().clone()
                self._buffers[i] = owner, key, name, owner[key]
                self._handed_out.pop(name, None)
        return {name: kept for _, _, name, kept in self._buffers if name in buffers}

    def hand_out(self, names: Collection[str], unread: Collection[str]) -> None:
        """Put a fresh tensor in the place of each buffer of `names`, which the forward assigns, and show the step's
        gradients. `unread`: the parameters that have none.

        Who keeps the old one (a history of means) keeps its numbers, as without a program. `check` takes it back.
        """
        if self._gradients is not None:
            self._gradients.show(unread)
        for owner, key, name, kept in self._buffers if names else ():
            if name in names:
                fresh = kept.detach().clone()
                owner[key] = fresh
                self._handed_out[name] = fresh, fresh._version

    def say_written(self) -> None:
        """Bump the version of every parameter, and of every average's.

        The program writes the banks, whose versions the views do not share. Autograd, and caches of values computed
        from weights, must notice.
        """
        torch.autograd.graph.increment_version(self._places)
        for average in self._averages:
            average.say_written()
        if self.notes_writes:
            self.note_versions()

    def check(self, *, frozen: bool = True) -> None:
        """Raise RuntimeError naming the first parameter that was replaced, moved, rebound, frozen or unfrozen.

        A buffer that was assigned again, as a forward outside the step may do, is copied back to its place. `frozen`:
        whether parameters that were frozen or unfrozen are refused; they can be saved and loaded as well as others.
        """
        if not (
            all(map(is_, map(dict.get, self._owners, self._keys), self._at_keys))
            and [*map(Tensor.data_ptr, self._places)] == self._pointers
            and self._are_like_their_places(*self._places)
            and not any(map(_requires_grad, self._frozen.values()))
        ):
            self._refuse(frozen)
        for owner, key, name, kept in self._buffers:
            if owner.get(key) is not kept:
                self._take_back(owner, key, name, kept)

    def _refuse(self, frozen: bool) -> None:
        for owner, key, name, parameter, place in self._tenants:
            if owner.get(key) is not parameter:
                raise RuntimeError(
                    f"{name} {list(parameter.shape)} was replaced by another tensor after compile_training_step(); the "
                    f"compiled program still updates the old one. Copy into it (parameter.copy_) or compile the step "
                    f"again."
                )
            if not parameter.is_set_to(place):
                raise RuntimeError(
                    f"{name} {list(place.shape)} was rebound (.data = …, .to(), .half(), a later step of the same "
                    f"model, which a cell makes that is run again) after compile_training_step(); the compiled program "
                    f"still updates the old memory. Copy into it (parameter.copy_), compile the step again, or call "
                    f"the later one."
                )
            if frozen and not parameter.requires_grad:
                raise RuntimeError(
                    f"{name} {list(parameter.shape)} was frozen (requires_grad=False) after compile_training_step(); "
                    f"the compiled program still updates it. Unfreeze it or compile the step again."
                )
        for name, parameter in self._frozen.items() if frozen else ():
            if parameter.requires_grad:
                raise RuntimeError(
                    f"{name} {list(parameter.shape)} was unfrozen (requires_grad=True) after compile_training_step(), "
                    f"and the step does not train it. Freeze it again, or make a new step (step.release(), then "
                    f"compile_training_step()), whose optimizer state starts anew."
                )

    def _take_back(self, owner: dict[str, Any], key: str, name: str, kept: Tensor) -> None:
        """Put the buffer `kept` in its place again, with the numbers of what stands there."""
        now = owner.get(key)
        given, version = self._handed_out.get(name, (kept, -1))
        if now is given and now._version == version:
            owner[key] = kept
            return
        if now is None or (now.shape, now.dtype, now.device) != (kept.shape, kept.dtype, kept.device):
            what = "removed" if now is None else f"replaced by {now.dtype} {list(now.shape)} on {now.device}"
            raise RuntimeError(
                f"buffer {name} was {what} after compile_training_step(); the compiled program updates "
                f"{kept.dtype} {list(kept.shape)} on {kept.device}. Put that back or compile the step again."
            )
        with torch.no_grad():
            kept.copy_(now)
        owner[key] = kept
