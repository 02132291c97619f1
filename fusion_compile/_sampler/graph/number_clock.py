"""A timestep that is a Python number: whether a model computes the same for it as for a tensor ``[]``.

diffusers' and many authors' models take ``model(x, 37)`` and make a tensor of the number themselves. A table has rows
for tensors. So a number is given to the trace as a tensor, after two real runs showed that it makes no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion_compile._capture.rehearsal.contents import as_it_was
from fusion_compile._sampler.graph.call import Call, invoke
from fusion_compile._sampler.weights.unservable import Unservable
from fusion_compile.passes._compat import tree_leaves


def refuse_other_numbers(model: nn.Module, call: Call) -> None:
    """Raise `Unservable` if `model` gives other bits for the numbers of `call` than for tensors in their place.

    An error of the model for the numbers themselves is raised as it is.
    """
    name, number = next(iter(call.numbers.items()))
    with as_it_was({"model": model}), torch.no_grad():
        arguments = call.rebuild([t.detach().clone() for t in call.tensors])
        expected = invoke(model, call, {**arguments, **call.numbers})
        try:
            got = invoke(model, call, call.rebuild([t.detach().clone() for t in call.tensors]))
        except Exception as error:
            said = str(error).strip().partition("\n")[0].rstrip(".")
            why = f"fails for a tensor in its place ({type(error).__name__}: {said})"
        else:
            if _equal(expected, got):
                return
            why = "computes something else for a tensor in its place"
    raise Unservable(
        f"{name}={number!r} is a number, and {type(model).__name__} {why}; a table needs a tensor. Pass {name} as a "
        f"tensor that the model takes, torch.full((len(x),), {number!r}) for example."
    )


def _equal(expected: object, got: object) -> bool:
    pairs = zip(tree_leaves(expected), tree_leaves(got), strict=True)
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in pairs
    )
