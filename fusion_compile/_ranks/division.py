"""A step's state over ranks: what each keeps, what travels, and how whole banks come from parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile._ranks._compat import start_all_gather, start_all_reduce, start_reduce_scatter, wait
from fusion_compile._ranks.groups import Group, Ranks
from fusion_compile._ranks.shares import Share, cut, parts_of
from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._types import Tensors
from fusion_compile.optim._total import total

REPLICATE, OPTIMIZER = FORMS = ("replicate", "optimizer")
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
    """

    ranks: Ranks
    whole: Layout
    owned: Layout
    shares: Mapping[str, Share]
    dtype: torch.dtype
    leaving: tuple[tuple[str, int], ...]

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
        back = sum(len(share.pieces) for share in self.divided.values()) * (1 + averages)
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

    def whole_entries(self, state: Tensors) -> Tensors:
        """The entries of `state` that are whole here, of banks that are divided."""
        return {key: state[key] for key, _ in self.kept_whole(state)}

    def seen(self, state: Tensors) -> Tensors:
        """By divided bank, the whole weights that the loss sees: at the gradient point where it is another."""
        return {k: state.get(keys.point(k), state[keys.module(k)]) for k in self.divided}

    def parts(self, state: Tensors) -> dict[str, str]:
        """Keys of `state`, with their banks, of which this rank has its part alone."""
        whole = {key for key, _ in self.kept_whole(state)}
        found: dict[str, str] = {}
        for key in state:
            section, rest = keys.split(key)
            bank = self.owned.bank_of(rest) if section == keys.OPTIMIZER else rest
            if section in (keys.PARAMS, *keys.LOST, keys.OPTIMIZER) and bank in self.divided and key not in whole:
                found[key] = bank
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
        divided = self.divided
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
        return tensor.shape[0] == len(self.shares[key].mine)


def divide(ranks: Ranks, whole: Layout, form: str, order: Sequence[str], dtype: torch.dtype | None = None) -> Division:
    """Divide the banks of `whole` among ranks. All ranks call this together.

    `form`: of `FORMS`. `order`: full parameter names in the order in which the forward uses them, as far as the model
    tells. `dtype`: in which gradients travel; None for that of the state.
    """
    sent = dtype or whole.state_dtype
    groups: dict[int, tuple[Group, Group | None]] = {}
    shares: dict[str, Share] = {}
    for bank in whole.banks:
        count = parts_of(bank.length, ranks.shards.size) if bank.matrix is not None and form == OPTIMIZER else 1
        if count == 1:
            shares[bank.key] = Share(bank, None, ranks.everyone, cut(bank, 1, sent.itemsize))
            continue
        if count not in groups:
            groups[count] = ranks.among(count)
        shares[bank.key] = Share(bank, *groups[count], cut(bank, count, sent.itemsize))
    owned = Layout(tuple(share.owned for share in shares.values()), whole.device)
    at = {name: i for i, name in enumerate(order)}
    firsts = {(key, i): at[name] for key, share in shares.items() for i, name in enumerate(_first_names(share))}
    return Division(ranks, whole, owned, shares, sent, tuple(sorted(firsts, key=lambda piece: -firsts[piece])))


def _first_names(share: Share) -> list[str]:
    """For each piece, the parameter in it that the forward uses first, whose gradient is ready last."""
    if share.bank.matrix is None:
        return [share.bank.places[0].name]
    names = [p.name for p, count in zip(share.bank.places, share.bank.matrices, strict=True) for _ in range(count)]
    return [names[piece.start] for piece in share.pieces]
