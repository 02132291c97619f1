"""Numbers with three digits and a unit, for the report."""

from __future__ import annotations

import math

_SI = ("", "k", "M", "G", "T", "P", "E")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def _digits(value: float) -> str:
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> tuple[float, str]:
    step = 0
    # 999.5 would be shown as 1000, so it takes the next unit.
    while abs(value) >= base - 0.5 and step < len(units) - 1:
        value, step = value / base, step + 1
    return value, units[step]


def count(value: float) -> str:
    """``12345`` -> ``"12,345"``."""
    return f"{value:,.0f}"


def flops(value: float) -> str:
    """``1.5e9`` -> ``"1.50 GFLOP"``."""
    sign = "−" if value < 0 else ""
    number, unit = _scaled(abs(value), 1000, _SI)
    return f"{sign}{_digits(number) if unit else f'{number:.0f}'} {unit}FLOP"


def size(value: float) -> str:
    """Bytes: ``1572864`` -> ``"1.50 MiB"``."""
    sign = "−" if value < 0 else ""
    number, unit = _scaled(abs(value), 1024, _BINARY)
    return f"{sign}{f'{number:.0f}' if unit == 'B' else _digits(number)} {unit}"


def time(microseconds: float) -> str:
    """``1500`` -> ``"1.50 ms"``."""
    sign, value = "−" if microseconds < 0 else "", abs(microseconds)
    if value >= 999_500:
        return f"{sign}{_digits(value / 1e6)} s"
    if value >= 999.5:
        return f"{sign}{_digits(value / 1e3)} ms"
    return f"{sign}{_digits(value)} µs" if value >= 0.9995 or not value else f"{sign}{_digits(value * 1e3)} ns"


def round_time(microseconds: float) -> str:
    """For an axis: ``1000`` -> ``"1 ms"``, ``0.1`` -> ``"100 ns"``."""
    units = ((1e6, "s"), (1e3, "ms"), (1.0, "µs"))
    unit, name = next((each for each in units if microseconds >= 0.999 * each[0]), (1e-3, "ns"))
    return f"{microseconds / unit:g} {name}"


def plain(value: float) -> str:
    """For an axis: ``1000000`` -> ``"1,000,000"``, ``0.1`` -> ``"0.1"``."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def share(part: float, whole: float) -> str:
    """``share(1, 8)`` -> ``"12 %"``; ``share(0, 0)`` -> ``"0 %"``."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"


def change(before: float, after: float) -> str:
    """``change(8, 9)`` -> ``"+12 %"``; ``"new"`` if `before` is 0, ``"="`` if nothing changed."""
    if before == after:
        return "="
    if not before:
        return "new"
    percent = 100 * (after - before) / before
    sign = "+" if percent > 0 else "−"
    return f"{sign}{abs(percent):.0f} %" if abs(percent) >= 10 else f"{sign}{abs(percent):.2g} %"


def finite(value: float | None) -> float | None:
    """Turn infinity and NaN into None, because JSON has neither. A node that moves no bytes has infinite intensity."""
    return value if value is not None and math.isfinite(value) else None
