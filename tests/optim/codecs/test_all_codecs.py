"""Codecs are found by name."""

import pytest

from fusion_compile.optim.codecs.all_codecs import CODECS, codec_of


def test_names_and_refusals() -> None:
    assert {name: codec_of("momentum", name).name for name in CODECS} == {name: name for name in CODECS}
    for wrong in ("int4", 8, None):
        with pytest.raises(
            ValueError, match=r"momentum=.* is not a codec; use one of 'fp32', 'bf16', 'int8', .*'4bit'"
        ):
            codec_of("momentum", wrong)
