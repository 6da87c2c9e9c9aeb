"""Numbers in words have three digits, or all of those before the point, and never an exponent."""

from __future__ import annotations

import pytest

from jacfunc._units import in_bytes, in_counts, in_seconds


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1000 B"),
        (1024, "1 KiB"),
        (1_040_000, "0.992 MiB"),
        (3 * 2**30, "3 GiB"),
        (5000 * 2**60, "5000 EiB"),
        (None, "?"),
    ],
)
def test_bytes(number: int | None, words: str) -> None:
    assert in_bytes(number) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (999_999, "1 M"), (12_345, "12.3 k")],
)
def test_counts(number: int, words: str) -> None:
    assert in_counts(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1.234e-7, "0.123 µs"),
        (0.9999e-3, "1 ms"),
        (0.0123, "12.3 ms"),
        (0.9999, "1 s"),
        (59.0, "59 s"),
        (1234.5, "1234 s"),
        (None, "?"),
    ],
)
def test_seconds(seconds: float | None, words: str) -> None:
    assert in_seconds(seconds) == words
