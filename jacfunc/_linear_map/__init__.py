"""A function at a point as a linear map: push tangents forward, pull cotangents back."""

from jacfunc._linear_map.agreement import (
    CHANGING,
    Evaluations,
    check_agreement,
    check_numbers,
    check_transpose,
    detached,
)
from jacfunc._linear_map.derivative import Derivative, pull_of_push, pull_of_pushes
from jacfunc._linear_map.graph import (
    Anchor,
    differentiable_alias,
    linearize,
    map_of_graph,
    no_view,
    writable_copy,
)
from jacfunc._linear_map.linearization import (
    EVERY,
    LeafNumbers,
    Linearization,
    chosen_leaves,
    nonzero_numbers,
)
from jacfunc._linear_map.operator import JacobianOperator
from jacfunc._linear_map.push import is_pushed_unwatched, push_on_graph, pushed_tensor
from jacfunc._linear_map.samples import (
    Dims,
    SampleFunction,
    Samples,
    batch_size,
    narrowed,
    one_sample,
    sample_chunks,
)
from jacfunc._linear_map.seeded import LinearMap, is_followed, one_by_one
from jacfunc._linear_map.walks import Graph, LeadsOut, Paths, graph_number, nodes_of_calls
