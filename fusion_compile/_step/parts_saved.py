"""One checkpoint that all ranks of a step write together, at once or in the background."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fusion_compile._state import checkpoint_folder, checkpoint_parts
from fusion_compile._types import Tensors


@dataclass(frozen=True)
class PartsSaved:
    """A checkpoint that is to be written.

    Attributes:
        folder: Of the checkpoint, the same on all ranks.
        tag: Of its files.
        tensors: What this rank writes, by key, on the CPU.
        facts: What the index says, on the first rank; None on the others.
        group: Of gloo, of all ranks; None for a rank that hears nobody.
    """

    folder: Path
    tag: str
    tensors: Tensors
    facts: Mapping[str, Any] | None
    group: Any

    def write(self) -> None:
        """Write it, and rename its index into place. Raises OSError on all ranks where that fails on one."""
        name = f"parts-{self.tag}"
        said: str | None = None
        try:
            if self.facts is None:
                checkpoint_parts.write(self.folder / name, self.tensors, self.group)
            else:
                with checkpoint_folder.replacing(self.folder, self.tag, [name]) as put_index:
                    sums = {"parts": checkpoint_parts.write(self.folder / name, self.tensors, self.group)}
                    form = checkpoint_folder.OF_PARTS
                    put_index(checkpoint_folder.index_of(self.facts, form, {"parts": name}, sums))
        except OSError as error:
            if isinstance(error, checkpoint_parts.Lost) or isinstance(error.__cause__, checkpoint_parts.Lost):
                raise
            said = str(error)
        if self.group is None:
            heard = [said]
        else:
            heard = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(heard, said, self.group)
        if (sentence := next((s for s in heard if s is not None), None)) is not None:
            raise OSError(sentence)
