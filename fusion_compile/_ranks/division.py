"""A step's state over ranks: what each keeps, what travels, and how whole banks come from parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._ranks._compat import start_all_gather, start_all_reduce, start_reduce_scatter, wait
from fusion_compile._ranks.alone import Alone
from fusion_compile._ranks.groups import Group, Ranks
from fusion_compile._ranks.ranges import ranges
from fusion_compile._ranks.shares import Share, cut, parts_of
from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._types import Tensors
from fusion_compile.optim._total import total

REPLICATE, OPTIMIZER, FULL = FORMS = ("replicate", "optimizer", "full")
_AVERAGES = "averages/"


@dataclass(frozen=True)
class Division:
    """Every bank's share, on this rank.

    Attributes:
        ranks: All that take part.
        whole: The model's banks.
        owned: The banks as this rank's optimizer sees them.
        shares: By bank key.
        dtype: In which gradients travel.
        leaving: Bank and piece in the order in which gradients are ready: the last layers' first.
        form: Of `FORMS`.
        publishes: Whether the module's whole weights are written now and then, and not in the program.
    """

    ranks: Ranks
    whole: Layout
    owned: Layout
    shares: Mapping[str, Share]
    dtype: torch.dtype
    leaving: tuple[tuple[str, int], ...]
    form: str = OPTIMIZER
    publishes: bool = False

    @property
    def divides_weights(self) -> bool:
        """Whether the state has this rank's part of the weights alone."""
        return (self.form == FULL or self.publishes) and bool(self.divided)

    @property
    def divided(self) -> dict[str, Share]:
        """The shares of banks that are divided."""
        return {key: share for key, share in self.shares.items() if share.inner is not None}

    # ------------------------------------------------------------------ gradients

    def pieces(self, named: Tensors) -> Tensors:
        """Gradients by full name -> what travels of them, by bank and piece, in the state dtype."""
        dtype = self.whole.state_dtype
        found: Tensors = {}
        for key, share in self.shares.items():
            parts = share.leaving([named[place.name] for place in share.bank.places], dtype)
            found |= {f"{key}#{i}": part for i, part in enumerate(parts)}
        return {f"{key}#{i}": found[f"{key}#{i}"] for key, i in self.leaving}

    def summed(self, pieces: Tensors, *, everywhere: bool = False) -> Tensors:
        """The sums over all ranks of what travels, as banks of this rank's matrices; of all with `everywhere`."""
        kept, started = self.whole.state_dtype, {}
        for key, i in self.leaving:
            share, given = self.shares[key], pieces[f"{key}#{i}"].to(self.dtype)
            if share.inner is None or everywhere:
                started[key, i] = start_all_reduce(given, self.ranks.everyone.name)
            else:
                started[key, i] = start_reduce_scatter(given, share.inner.size, share.inner.name)
        done: dict[tuple[str, int], Tensor] = {}
        for key, i in self.leaving:
            share, part = self.shares[key], wait(started[key, i])
            if share.inner is not None and share.outer is not None and not everywhere:
                part = wait(start_all_reduce(part, share.outer.name))
            done[key, i] = part.to(kept)
        out: Tensors = {}
        for key, share in self.shares.items():
            parts = [done[key, i] for i in range(len(share.pieces))]
            out[key] = share.whole(parts) if everywhere and share.inner is not None else share.arrived(parts)
        return out

    def share_of_squares(self, owned: Tensors) -> Tensor:
        """What this rank adds to the sum of squares over all entries, 0-dim: the ranks' shares add up to it."""
        by_copies: dict[int, list[Tensor]] = {}
        for key, tensor in owned.items():
            exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            by_copies.setdefault(self.copies(key), []).append(exact * exact)
        found = [total(squares, torch.zeros(())) / copies for copies, squares in by_copies.items()]
        return found[0] if len(found) == 1 else torch.stack(found).sum()

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all ranks."""
        return wait(start_all_reduce(tensor, self.ranks.everyone.name)) / self.ranks.world

    def copies(self, key: str) -> int:
        """How many ranks have the part of bank `key` that this rank has."""
        share = self.shares[key]
        return self.ranks.world if share.inner is None else share.copies

    def norm_alone(self, named: Tensors) -> Tensor:
        """The norm of gradients by full name as a step alone has it (`alone`): what this rank owns stands for what the
        others do."""
        own = self.own(self.whole.join(named))
        return (self.share_of_squares(own) * self.ranks.world).sqrt()

    def collectives(self, *, averages: int, buffers: bool, everywhere: bool) -> int:
        """How many collectives a step's program has. `averages`: of weights; `buffers`: whether some floating-point one
        changes; `everywhere`: whether whole gradients are kept."""
        pieces = len(self.leaving)
        across = sum(
            self.shares[key].inner is not None and self.shares[key].outer is not None for key, _ in self.leaving
        )
        back = 0 if self.publishes else sum(len(share.pieces) for share in self.divided.values()) * (1 + averages)
        return pieces + (0 if everywhere else across) + 1 + buffers + (1 + back if self.divided else 0)

    # ------------------------------------------------------------------ weights

    def own(self, banks: Tensors) -> Tensors:
        """Whole banks -> this rank's parts, as views."""
        return {key: self.shares[key].own(bank) for key, bank in banks.items()}

    def gathered(self, owned: Tensors) -> Tensors:
        """Parts by bank key -> whole banks. Only banks that are divided."""
        return self._gathered({key: (key, tensor) for key, tensor in owned.items()})

    def _gathered(self, owned: Mapping[str, tuple[str, Tensor]]) -> Tensors:
        started: dict[str, list[Tensor]] = {}
        for key, (bank, tensor) in owned.items():
            inner = self.shares[bank].inner
            assert inner is not None
            parts = self.shares[bank].sent(tensor)
            started[key] = [start_all_gather(part, inner.size, inner.name) for part in parts]
        return {key: self.shares[owned[key][0]].whole([wait(p) for p in parts]) for key, parts in started.items()}

    def seen(self, mine: Tensors, state: Tensors) -> Tensors:
        """The weights that the loss sees, by full name, of banks that are divided.

        `mine`: where this rank's parts of them alone are kept, those, by bank key. `state`: where they lie whole: at
        the gradient point, if that is another place than the module.
        """
        found: Tensors = {}
        started: dict[str, list[Tensor]] = {}
        for key, share in self.divided.items():
            whole = state.get(keys.point(key), None if self.divides_weights else state.get(keys.module(key)))
            if whole is None:
                assert share.inner is not None
                with _compat.region("communication"):
                    parts = share.sent(mine[key].to(share.bank.dtype))
                    started[key] = [start_all_gather(part, share.inner.size, share.inner.name) for part in parts]
            else:
                found |= zip((p.name for p in share.bank.places), share.bank.split(whole), strict=True)
        for key, parts in started.items():
            with _compat.region("communication"):
                parts = [wait(part) for part in parts]
            found |= self.shares[key].views(parts)
        return found

    def alone(self) -> Alone:
        """Inside, nothing is sent: see `Alone`."""
        groups = [g for share in self.shares.values() for g in (share.inner, share.outer) if g is not None]
        return Alone({g.name: g for g in (self.ranks.everyone, *groups)})

    # ------------------------------------------------------------------ the flat state

    def narrowed(self, state: Tensors) -> Tensors:
        """`state` with this rank's parts in the place of what is kept whole beside them: the module's banks, and
        averages of weights. Does not change `state`. What is narrowed already stays so."""
        found = {
            key: self.shares[bank].own(state[key])
            for key, bank in self.kept_whole(state)
            if not self.is_owned(bank, state[key])
        }
        return {**state, **found}

    def widened(self, new: Tensors, state: Tensors) -> Tensors:
        """`new` with whole banks in the place of parts, for entries that `state` has whole."""
        wide = {key: bank for key, bank in self.kept_whole(state) if key in new}
        return {**new, **self._gathered({key: (bank, new[key]) for key, bank in wide.items()})}

    def owned_names(self, names: Collection[str]) -> set[str]:
        """`names` of parameters as `owned` has them: of a stack its matrices, one by one."""
        places = [place.name for bank in self.owned.banks for place in bank.places]
        return {name for name in places if name in names or name.rpartition("[")[0] in names}

    def whole_entries(self, state: Tensors) -> Tensors:
        """The entries of `state` that are whole here, of banks that are divided."""
        return {key: state[key] for key, _ in self.kept_whole(state)}

    def deployed(self, state: Tensors) -> Tensors:
        """By divided bank, what this rank keeps of what the module shows, where it keeps its part alone."""
        return {k: state.get(keys.module(k), state.get(keys.params(k))) for k in self.divided}  # type: ignore[misc]

    def parts(self, state: Tensors) -> dict[str, str]:
        """Keys of `state`, with their banks, of which this rank has its part alone."""
        whole = {key for key, _ in self.kept_whole(state)}
        found: dict[str, str] = {}
        for key in state:
            section, rest = keys.split(key)
            bank = self.owned.bank_of(rest) if section == keys.OPTIMIZER else rest
            shown = section == keys.PARAMS and keys.module(rest) not in state  # a checkpoint has it as the model's
            if section in (keys.PARAMS, *keys.LOST, keys.OPTIMIZER) and bank in self.divided and key not in whole:
                found |= {} if shown else {key: bank}
        return found

    def assembled(self, bank: str, part: Tensor) -> Tensor:
        """The whole of something of which each rank has a part of divided bank `bank`, bit for bit, of any dtype. All
        ranks call this together."""
        sent = part.contiguous().view(len(part), -1).view(torch.uint8)
        whole = self.gathered({bank: sent})[bank]
        return whole.view(part.dtype).view(-1, *part.shape[1:])

    def writes(self, bank: str) -> bool:
        """Whether this rank, and none of those that have the same part of divided bank `bank`, saves it."""
        outer = self.shares[bank].outer
        return outer is None or outer.rank == [*self.divided].index(bank) % outer.size

    def kept_whole(self, state: Tensors) -> list[tuple[str, str]]:
        """Keys of `state`, with their banks, of divided banks that every rank keeps whole."""
        divided = {} if self.divides_weights else self.divided
        found = []
        for key in state:
            section, rest = keys.split(key)
            if section == keys.MODULE and rest in divided:
                found.append((key, rest))
            elif section == keys.OPTIMIZER and rest.startswith(_AVERAGES):
                found += [(key, bank) for bank in divided if rest.endswith(f"/{bank}")]
        return found

    def is_owned(self, key: str, tensor: Tensor) -> bool:
        """Whether `tensor`, shaped like bank `key` in its leading dimension, is a part already."""
        return tensor.shape[0] == self.shares[key].kept


def divide(
    ranks: Ranks,
    whole: Layout,
    form: str,
    order: Sequence[str],
    dtype: torch.dtype | None = None,
    cuts: Collection[str] = (),
) -> Division:
    """Divide the banks of `whole` among ranks. All ranks call this together.

    `form`: of `FORMS`. `order`: full parameter names in the order in which the forward uses them, as far as the model
    tells. `dtype`: in which gradients travel; None for that of the state. `cuts`: keys of the flat banks that are
    divided, too, entry by entry.
    """
    sent = dtype or whole.state_dtype
    groups: dict[int, tuple[Group, Group | None]] = {}
    shares: dict[str, Share] = {}
    for bank in whole.banks:
        count = parts_of(bank.length, ranks.shards.size) if bank.matrix is not None and form != REPLICATE else 1
        count = ranks.shards.size if bank.key in cuts else count
        if count > 1 and count not in groups:
            groups[count] = ranks.among(count)
        divided: Share | None = None
        if bank.key in cuts:
            divided = ranges(bank, *groups[count], sent.itemsize) if count > 1 else None
        elif count > 1:
            divided = Share(bank, *groups[count], cut(bank, count, sent.itemsize))
        shares[bank.key] = divided or Share(bank, None, ranks.everyone, cut(bank, 1, sent.itemsize))
    owned = Layout(tuple(share.owned for share in shares.values()), whole.device)
    at = {name: i for i, name in enumerate(order)}
    firsts = {(key, i): at[name] for key, share in shares.items() for i, name in enumerate(share.first_names())}
    return Division(ranks, whole, owned, shares, sent, tuple(sorted(firsts, key=lambda piece: -firsts[piece])), form)
