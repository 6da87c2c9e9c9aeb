"""Torch from below: transforms, vmap, autograd, random numbers. Its private names stay here."""

from jacfunc._torch.attention import MathAttention, may_attend
from jacfunc._torch.autograd import all_modes, recording, run_backward, tracked, uncast, untracked
from jacfunc._torch.compiled import Graphs, as_written, run_as_written, uncompiled
from jacfunc._torch.derivatives import (
    constant,
    has_tangent,
    is_differentiated,
    is_recording_at,
    is_second_order_forward,
    is_third_order,
    is_tracked,
    num_derivatives,
)
from jacfunc._torch.entering import PULLED, at_forward_level, at_reverse_level, pushed_product
from jacfunc._torch.levels import (
    below_transforms,
    innermost,
    inside_derivative,
    inside_transform,
    is_batched,
    is_outermost,
    is_pushing,
    is_traced,
    is_undisturbed,
    lacks_forward_kernel,
    levels,
    makes_plain_tensors,
    memories_of,
    memory_of,
    newer_transforms,
    num_vmap_levels,
    off_graph,
    outside_transforms,
)
from jacfunc._torch.pullback import Pull, dtypes_of, innermost_level, is_right_twice, nodes_behind
from jacfunc._torch.random import DRAWING, RandomState, fixed, may_draw, noise_like
from jacfunc._torch.vmap import (
    batched,
    below_vmap,
    call_of_all_samples,
    fast_linear,
    has_strided_samples,
    holds_nan,
    of_all_samples,
    sweep_batch,
)
