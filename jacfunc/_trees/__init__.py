"""Trees and leaves: the only package that knows optree."""

from jacfunc._trees.in_dims import (
    Arguments,
    check_batch,
    check_dims,
    is_batch,
    positional,
    sample_dims,
)
from jacfunc._trees.objects import attributes_of, codes_in, referred, slots_of
from jacfunc._trees.split import (
    Given,
    Split,
    holds_floats_alone,
    kind_of,
    kinds_of,
    paths,
    without_settings,
)
from jacfunc._trees.tree import (
    LEAF,
    Structure,
    StructureError,
    aligned,
    broadcast_prefix,
    flatten,
    flatten_containers,
    map_tensors,
    stack_trees,
    unflatten,
)
