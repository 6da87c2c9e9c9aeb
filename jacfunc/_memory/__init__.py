"""How much memory there is, and in which pieces work is done."""

from jacfunc._memory.available import free_bytes
from jacfunc._memory.chunks import Chunk, FittedChunks, Pieces, evenly, in_chunks, largest, of_leaf
from jacfunc._memory.counting import PeakBytes, dense_tensors
from jacfunc._memory.heap import keep_heap
from jacfunc._memory.limits import LARGE, STAGED_BYTES
