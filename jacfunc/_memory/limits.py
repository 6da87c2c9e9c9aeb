"""Byte counts by which memory is handled, each by what it means.

Functions and fields take them as defaults, so that a test can pass a small one.
"""

from __future__ import annotations

LARGE = 2**25
"""Blocks of memory up to this size stay in the C library's heap when they are freed, and are used
again. A larger block gets new pages each time."""

PAGED_BYTES = 2**22
"""Tensors of results, and blocks of streams, are written into pages of earlier ones from this size
on. A result has many, and a loop two of them at a time: it frees more than the heap keeps."""

STAGED_BYTES = 2**24
"""Results that wait to be copied to where they belong: few enough for the heap to keep them."""

LEAST_SWEPT_BYTES, MOST_SWEPT_BYTES = 6 * 2**20, LARGE
"""Cotangents of one sweep: enough to be worth a sweep, few enough for the heap to keep them."""

MULTIPLIED_BYTES = 2**23
"""Rows, or products of positions, that are multiplied at once: they stay in the cache."""

SQUARED_BYTES = 2**22
"""Rows that are written out at once to be squared: they stay in the cache."""

DRAWN_BYTES = 2**24
"""The part of a random matrix that exists at a time."""

MOST_COPIED_BYTES = 2**26
"""Constants of a module up to this size are copied before an evaluation that may write to them."""

COMPARED_BYTES = 2**13
"""Parameters up to this size are copied before each call and compared with it afterwards."""

COMPARED_GRAPH_BYTES = 2**22
"""The graph of samples that are compared with those of another batch, to see if they depend."""

PIECE_BYTES = 2**23
"""What a row of the samples may take that are evaluated at once, where all samples would take more
than is modest: enough to be worth an evaluation, and little beside a large result."""

MODEST_BYTES = 2**26
"""A sweep up to this size is made without a look at how much memory is free."""

CROWDED_BYTES, SPARE_BYTES = 2**24, 2**23
"""Where the rows of all samples at one operation take more than the first, the heap does not keep
them; then a sweep takes only as many rows as fit into the second."""
