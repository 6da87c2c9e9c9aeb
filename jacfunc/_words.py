"""Numbers in words: three digits and a unit."""

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


def in_bytes(number: int | None) -> str:
    """``39.1 GiB``."""
    return _human(number, BYTES, " B", 1024)


def in_seconds(seconds: float | None) -> str:
    """``1.23 ms``."""
    if seconds is None:
        return UNKNOWN
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _human(number: int | None, units: tuple[str, ...], plain: str, step: int) -> str:
    if number is None:
        return UNKNOWN
    scaled, unit = float(number), plain
    for bigger in units:
        if scaled < step:
            break
        scaled, unit = scaled / step, bigger
    return f"{number}{unit}" if unit == plain else f"{scaled:.3g}{unit}"
