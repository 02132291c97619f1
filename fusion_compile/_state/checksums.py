"""Checksums of a checkpoint: one for each tensor and one for its index, so that a flipped bit is noticed.

CRC-32: it finds every error within 32 neighbouring bits, costs less than writing the bytes does, and is in the standard
library. It guards against damage, not against an attacker.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_compile._types import Tensors


def of_tensor(tensor: Tensor) -> str:
    """Eight hexadecimal digits from dtype, shape and bytes: fp16 read as bf16 has the same bytes."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    described = zlib.crc32(f"{plain.dtype} {list(plain.shape)}".encode())
    data: Any = plain.reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data, described):08x}"


def of_tensors(tensors: Tensors) -> dict[str, str]:
    """`of_tensor` by name."""
    return {name: of_tensor(tensor) for name, tensor in tensors.items()}


def of_index(index: Mapping[str, Any]) -> str:
    """The checksum of an index, whatever order and spacing its JSON has; its own entry ``checksum`` is left out."""
    rest = {key: value for key, value in index.items() if key != "checksum"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def damaged(tensors: Tensors, expected: Mapping[str, Any]) -> list[str]:
    """One line for each tensor that is not the one whose checksum `expected` has."""
    lines = [f"{name} is not among the checksums of the index" for name in tensors if name not in expected]
    lines += [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name in expected and (found := of_tensor(tensor)) != expected[name]:
            was = f"{list(tensor.shape)} {tensor.dtype} has the checksum {found}"
            lines.append(f"{name} {was}, and was saved with {expected[name]}")
    return lines
