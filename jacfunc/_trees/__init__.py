"""Trees and leaves: the only package that knows optree."""

from jacfunc._trees.in_dims import Arguments, check_batch, sample_dims
from jacfunc._trees.tree import (
    Split,
    StructureError,
    aligned,
    broadcast_prefix,
    flatten,
    kind_of,
    kinds_of,
    map_tensors,
    paths,
    stack_trees,
    unflatten,
)
