"""Every codec by the name that users write."""

from __future__ import annotations

from fusion_compile.optim.codecs.bf16 import BF16
from fusion_compile.optim.codecs.codec import Codec
from fusion_compile.optim.codecs.four_bits import FOUR_BITS
from fusion_compile.optim.codecs.fp32 import FP32
from fusion_compile.optim.codecs.int8 import INT8
from fusion_compile.optim.codecs.int8_companded import INT8_COMPANDED

CODECS: dict[str, Codec] = {codec.name: codec for codec in (FP32, BF16, INT8, INT8_COMPANDED, FOUR_BITS)}


def codec_of(where: str, name: object) -> Codec:
    """The codec called `name`. ValueError that lists all for any other; `where` begins the sentence."""
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"{where}={name!r} is not a codec; use one of {', '.join(map(repr, CODECS))}.")
    return CODECS[name]
