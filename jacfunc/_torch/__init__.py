"""Torch from below: transforms, vmap, autograd, random numbers. Its private names stay here."""

from jacfunc._torch.attention import math_attention
from jacfunc._torch.autograd import (
    constant,
    has_tangent,
    is_differentiated,
    is_tracked,
    off_graph,
    recording,
    run_backward,
)
from jacfunc._torch.compiled import as_written, run_as_written, uncompiled
from jacfunc._torch.levels import (
    below_transforms,
    inside_derivative,
    inside_functorch,
    inside_transform,
    is_batched,
    is_outermost,
    is_pushing,
    lacks_forward_kernel,
    levels,
    memory_of,
    newer_transforms,
    num_forward_levels,
    num_vmap_levels,
    outside_transforms,
)
from jacfunc._torch.orders import (
    Pull,
    innermost_level,
    is_reverse_of_second_forward,
    is_right_twice,
    is_second_order_forward,
    num_derivatives,
)
from jacfunc._torch.random import DRAWING, RandomState, may_draw
from jacfunc._torch.vmap import (
    at_once,
    below_vmap,
    holds_nan,
    innermost,
    is_spread,
    mapped,
    mapped_anyway,
    of_samples,
    sweep_batch,
)
