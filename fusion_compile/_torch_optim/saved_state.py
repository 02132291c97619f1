"""Load a torch optimizer's ``state_dict()``: everything is checked first, then copied into place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from fusion_compile._state.mismatches import refuse_mismatches
from fusion_compile._torch_optim.group_numbers import as_float, check_saved
from fusion_compile._torch_optim.grouped_update import REMEDY, GroupedUpdate, Options, State
from fusion_compile._torch_optim.parameter_group import Parts
from fusion_compile._torch_optim.torch_words import BETAS


def load_saved(inside: GroupedUpdate, own: list[Options], state: State, saved: Mapping[str, Any]) -> None:
    """Load `saved` into the groups `own` and their `state`. TypeError or ValueError before anything is changed."""
    if lacking := [k for k in ("state", "param_groups") if k not in saved]:
        raise ValueError(f"this is no optimizer's state_dict(): it lacks {', '.join(lacking)}.")
    theirs, sizes = saved["param_groups"], [len(options["params"]) for options in own]
    if [len(options["params"]) for options in theirs] != sizes:
        raise ValueError(
            f"the checkpoint has parameter groups of {[len(options['params']) for options in theirs]} parameters, "
            f"this optimizer of {sizes}; nothing was loaded. Build it with the groups that saved it."
        )
    check_saved(theirs, inside.numbers)
    parts: list[dict[str, Parts]] = []
    for record, options in zip(inside.records, theirs, strict=True):
        named = {
            n: saved["state"].get(i)
            for n, i in zip(_names_in_order(record.names, options), options["params"], strict=True)
        }
        parts.append({n: kept for n, kept in named.items() if kept})
    targets = {}
    for at, record in enumerate(inside.records):
        if record.group is not None and not record.group.in_place:
            record.group = None
        if record.group is not None or (parts[at] and any(p.requires_grad for p in own[at]["params"])):
            targets[at] = record.group or inside.new_group(at, own[at])
    refuse_mismatches([p for at, group in targets.items() for p in group.problems(parts[at])], REMEDY)

    inside.loads += 1
    for kept in inside.averages:
        kept.forget_written()
    for at, (record, options) in enumerate(zip(inside.records, own, strict=True)):
        options.update({k: copy.deepcopy(v) for k, v in theirs[at].items() if k not in ("params", "param_names")})
        record.seen = {n: as_float(options[n]) for n in record.seen}
        if inside.betas:
            options[BETAS] = tuple(record.seen[n] for n in inside.betas)
        for name, p in zip(record.names, options["params"], strict=True):
            state.pop(p, None)
            if name in parts[at]:
                state[p] = dict(parts[at][name])  # a frozen parameter's, until it joins
    # What others keep under keys of their own, as torch.optim loads it.
    state.update({key: value for key, value in saved["state"].items() if not isinstance(key, int)})
    for at, group in targets.items():
        with torch.no_grad():
            group.load_saved(parts[at])
        inside.adopt(group, own[at], state)


def _names_in_order(names: list[str], theirs: Mapping[str, Any]) -> list[str]:
    """Our `names` in the order in which a saved group has its parameters.

    It is the order of our own group, as in torch.optim, unless the checkpoint has the same names in another order.
    """
    saved = theirs.get("param_names")
    same = saved is not None and len(saved) == len(set(saved)) and set(saved) == set(names)
    return list(saved) if same and saved is not None else names
