"""Seeds of a sweep, and sinks that assemble its products into the blocks of a Jacobian."""

from jacfunc._assembly.basis import (
    as_leaves,
    basis,
    in_a_row,
    numel,
    shared_units,
    sweep,
    sweep_leaves,
    unit_seeds,
)
from jacfunc._assembly.blocks import columns_to_blocks, owned, rows_to_blocks, stack
from jacfunc._assembly.diagonal import DiagonalSink
from jacfunc._assembly.out import Places, sink_for
from jacfunc._assembly.pages import empty, empty_cache
from jacfunc._assembly.sinks import NEW_TENSORS, Grid, Sink, Sweep
from jacfunc._assembly.writable import read_by
