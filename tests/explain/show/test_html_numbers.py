"""Numbers with three digits and a unit."""

from __future__ import annotations

import pytest

from fusion_compile.explain._show import html_numbers


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (html_numbers.size(0), "0 B"),
        (html_numbers.size(1023), "1023 B"),
        (html_numbers.size(1_572_864), "1.50 MiB"),
        (html_numbers.size(2**30 - 1), "1.00 GiB"),
        (html_numbers.size(-2048), "−2.00 KiB"),
        (html_numbers.flops(999), "999 FLOP"),
        (html_numbers.flops(1.5e12), "1.50 TFLOP"),
        (html_numbers.time(0.034), "34.0 ns"),
        (html_numbers.time(0), "0 µs"),
        (html_numbers.time(999.6), "1.00 ms"),
        (html_numbers.time(2.5e6), "2.50 s"),
        (html_numbers.share(1, 8), "12 %"),
        (html_numbers.share(1, 10_000), "< 0.1 %"),
        (html_numbers.share(0, 0), "0 %"),
        (html_numbers.change(8, 9), "+12 %"),
        (html_numbers.change(3, 3), "="),
        (html_numbers.change(0, 3), "new"),
        (html_numbers.round_time(100_000), "100 ms"),
        (html_numbers.round_time(0.01), "10 ns"),
    ],
)
def test_numbers_read_well(said: str, wanted: str) -> None:
    assert said == wanted
