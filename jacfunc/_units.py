"""Numbers as text: three digits and a unit."""

from __future__ import annotations

COUNTS = (" k", " M", " G", " T", " P", " E")
BYTES = (" KiB", " MiB", " GiB", " TiB", " PiB", " EiB")
UNKNOWN = "?"


def in_counts(number: int | None) -> str:
    """``39.1 M``."""
    return _human(number, COUNTS, "", 1000)


def in_digits(number: int | None) -> str:
    """``4096``."""
    return UNKNOWN if number is None else str(number)


def in_calls(number: float | None) -> str:
    """``39.1 k calls``; ``never`` if it is infinite."""
    if number is None:
        return UNKNOWN
    return "never" if number == float("inf") else f"{in_counts(round(number))} calls"


def in_bytes(number: int | None) -> str:
    """``39.1 GiB``."""
    return _human(number, BYTES, " B", 1024)


def in_seconds(seconds: float | None) -> str:
    """``1.23 ms``."""
    if seconds is None:
        return UNKNOWN
    rounded = float(f"{seconds:.3g}")
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if rounded >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def _human(number: int | None, units: tuple[str, ...], plain: str, step: int) -> str:
    if number is None:
        return UNKNOWN
    scaled, unit = float(number), plain
    for bigger in units:
        # whole numbers up to the step; of the others three digits, not 1.02e+03 KiB
        if scaled < step if unit == plain else float(f"{scaled:.3g}") < 1000:
            break
        scaled, unit = scaled / step, bigger
    return f"{number}{unit}" if unit == plain else f"{_three_digits(scaled)}{unit}"


def _three_digits(number: float) -> str:
    """Three digits; all digits before the point, where there are more than three."""
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
