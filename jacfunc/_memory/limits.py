"""Sizes in bytes by which memory is handled, by their meaning."""

from __future__ import annotations

LARGE = 2**25
"""Bytes up to which a heap keeps what is freed and hands it out again."""


STAGED_BYTES = 2**24
"""Bytes that wait to be written elsewhere: so few that the allocator keeps their memory, and the
next piece is made in it."""
