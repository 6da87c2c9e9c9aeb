"""How much memory there is, how much of it is used, and in which chunks work is done."""

from jacfunc._memory.available import all_bytes, free_bytes
from jacfunc._memory.budget import Budget
from jacfunc._memory.chunks import GROWTH, Chunk, FittedChunks, evenly, in_chunks, largest, of_leaf
from jacfunc._memory.counting import DispatchMode, PeakBytes, dense_tensors
from jacfunc._memory.heap import at_most, give_back, is_on_a_budget, keep_heap, mapped, sparing
from jacfunc._memory.limits import (
    COMPARED_BYTES,
    COMPARED_GRAPH_BYTES,
    CROWDED_BYTES,
    DRAWN_BYTES,
    LARGE,
    LEAST_SWEPT_BYTES,
    MODEST_BYTES,
    MOST_COPIED_BYTES,
    MOST_SWEPT_BYTES,
    MULTIPLIED_BYTES,
    PAGED_BYTES,
    PIECE_BYTES,
    SPARE_BYTES,
    SQUARED_BYTES,
    STAGED_BYTES,
)
from jacfunc._memory.reading import bytes_in
from jacfunc._memory.unallocated import Unallocated
