"""Learnable tensors outside of the model: a loss may depend on them, and nobody trains them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fusion_compile._capture.rehearsal.reach import Reach

_TRAINED: Any = WeakTensorKeyDictionary()
"""Parameters that some step trains."""


def note_trained(parameters: Iterable[Tensor]) -> None:
    """From now on, `parameters` have a step that trains them; other losses may depend on them."""
    for parameter in parameters:
        _TRAINED[parameter] = True


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The leaves of autograd's graph on which `loss` depends."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found[id(leaf)] = leaf
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return list(found.values())


def trained_by_the_loss(leaves: Iterable[Tensor]) -> list[Tensor]:
    """Those of `leaves`, on which a loss depends, that no step trains: parameters of other modules, which the loss must
    train itself."""
    return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and leaf not in _TRAINED]


def refuse_learnable(leaves: Collection[Tensor], roots: Mapping[str, Any], written: Collection[str]) -> None:
    """Raise ValueError if a loss depends on a learnable tensor that its step does not train.

    A tensor that the loss made itself (an input whose gradient it asks for) is none. Nor is what another step trains,
    or what the loss updates itself (a discriminator with an optimizer of its own).

    Args:
        leaves: On which the loss depends, apart from the model's own parameters.
        roots: What can be reached from the model and the loss, by label, with everything as before the loss ran.
        written: Labels of tensors that the loss writes in place.
    """
    suspects = {id(leaf): leaf for leaf in leaves if leaf not in _TRAINED}
    if not suspects:
        return
    labels = {id(tensor): label for label, tensor in Reach(roots).tensors.values()}
    for identity, leaf in suspects.items():
        label = labels.get(identity, "a parameter of another module" if isinstance(leaf, nn.Parameter) else "")
        if label and label not in written:
            raise ValueError(
                f"the loss depends on {label} {list(leaf.shape)}, which requires a gradient and is no parameter of the "
                f"model, so this step does not train it. Make it part of the model (a module that holds both, or "
                f"nn.ModuleList([model, head])), or call requires_grad_(False) on it if it shall stay as it is."
            )
