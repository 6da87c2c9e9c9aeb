"""Leaves a vmap from inside: the tensor of all samples behind that of one, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isnan
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _functorch, _len_torch_dispatch_stack
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from jacfunc._arguments import are_plain, check_plain
from jacfunc._errors import Refused
from jacfunc._torch.autograd import untracked
from jacfunc._torch.levels import Transform, below_transforms, innermost
from jacfunc._types import Leaves

Level: TypeAlias = Transform | None
"""An active transform; None if no transform is active."""


def unbatched(tensor: Tensor, level: Level) -> tuple[Tensor, int | None]:
    """The tensor of all samples, and their dimension; None if all samples share the tensor."""
    if level is None or not _functorch.is_batchedtensor(tensor):
        return tensor, None
    if _functorch.maybe_get_level(tensor) != level[1]:
        return tensor, None
    return _functorch.get_unwrapped(tensor), _functorch.maybe_get_bdim(tensor)


def of_all_samples(tensor: Tensor, size: int, level: Level) -> Tensor:
    """The tensor ``[B, *shape]`` of all samples, expanded if all share it."""
    values, dim = unbatched(tensor, level)
    if dim is None:
        return values.expand(size, *values.shape)
    return values.movedim(dim, 0) if dim else values


def batched(tensor: Tensor, size: int, level: Level) -> tuple[Tensor, Tensor, int | None]:
    """The tensor with a dimension of samples in this vmap, expanded if all share it.

    Beside it the tensor of all samples, and their dimension; None outside of a vmap.
    """
    values, dim = unbatched(tensor, level)
    if level is None or dim is not None:
        return tensor, values, dim
    expanded = values.expand(size, *values.shape)
    return _functorch._add_batch_dim(expanded, 0, level[1]), expanded, 0


def call_of_all_samples(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], level: Level
) -> Any:
    """``func(*args)`` called once with all samples in front of the first argument, below vmap.

    If another argument differs between samples, too, it is called as usual.
    """
    first, *others = args
    values, dim = unbatched(first, level)
    rest = (*others, *kwargs.values())
    if level is None or dim is None or any(_is_mapped(x, level) for x in rest):
        return func(*args, **kwargs)
    with temporarily_pop_interpreter_stack():
        out = func(values.movedim(dim, 0), *others, **kwargs)
    return _functorch._add_batch_dim(out, 0, level[1])


LARGE_PRODUCT, LARGE_WEIGHT = 2**21, 2**10
"""For at least this many multiplications oneDNN's product of matrices was up to twice as fast. A
weight with fewer numbers than the second is not looked at."""


def fast_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear(x, weight)``; by oneDNN, below a vmap of ``x`` alone, where that is faster.

    Torch's own products of float32 matrices are MKL's, which is slower on CPUs of other makers.
    """
    linear = torch.nn.functional.linear
    is_small = x.numel() * weight.shape[0] < LARGE_PRODUCT and not _functorch.is_batchedtensor(x)
    if is_small or weight.numel() < LARGE_WEIGHT:
        return linear(x, weight)
    level = innermost()
    values, dim = unbatched(x, level)
    is_elsewhere = (level is None) != (dim is None) or dim == values.dim() - 1
    is_large = values.numel() * weight.shape[0] >= LARGE_PRODUCT
    if is_elsewhere or not is_large or _is_seen((x, weight)) or not is_for_onednn(values, weight):
        return linear(x, weight)
    out: Tensor = _onednn_linear()(values, weight, None, "none", [], "")
    return out if level is None or dim is None else _functorch._add_batch_dim(out, dim, level[1])


@cache
def _onednn_linear() -> Callable[..., Tensor]:
    linear: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return linear


def _is_seen(tensors: Leaves) -> bool:
    """Does autograd or a mode look at what is done with the tensors?"""
    return (
        (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._is_torch_function_mode_enabled()
    )


def is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Are they plain, dense float32 tensors on a CPU, the second one a matrix?"""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.layout == weight.layout == torch.strided
        and x.is_cpu
        and weight.is_cpu
        and weight.dim() == 2
        and are_plain((x, weight))
        and not _functorch.is_functorch_wrapped_tensor(x)
        and not _functorch.is_functorch_wrapped_tensor(weight)
        and torch._C._has_mkldnn
        and torch._C._get_mkldnn_enabled()
    )


def below_vmap(func: Callable[[Leaves], Leaves], leaves: Leaves) -> Leaves:
    """Apply ``func`` to the leaves ``[B, *shape]`` of all samples, from inside the vmap over them.

    Raises:
        Refused: if vmap is not the innermost transform, or no leaf differs between samples.
    """
    level = innermost()
    dims = [unbatched(leaf, level)[1] for leaf in leaves]
    if level is None or all(dim is None for dim in dims):
        raise Refused("torch's backward pass of it is wrong inside vmap")
    size = next(
        _functorch.get_unwrapped(leaf).shape[dim]
        for leaf, dim in zip(leaves, dims, strict=True)
        if dim is not None
    )
    all_samples = tuple(of_all_samples(leaf, size, level) for leaf in leaves)
    with temporarily_pop_interpreter_stack():
        results = func(all_samples)
    return tuple(_functorch._add_batch_dim(x, 0, level[1]) for x in results)


def _is_mapped(value: Any, level: Level) -> bool:
    """Does the value differ between the samples of this vmap?"""
    return isinstance(value, Tensor) and unbatched(value, level)[1] is not None


def has_strided_samples(tensor: Tensor) -> bool:
    """Is the tensor batched by a vmap, and are its samples not contiguous in memory?"""
    is_mapped = False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            is_mapped = True
            if _functorch.maybe_get_bdim(tensor):
                return True
        tensor = _functorch.get_unwrapped(tensor)
    return is_mapped and not tensor.is_contiguous()


def holds_nan(tensor: Tensor) -> bool:
    """Is a number of the tensor nan, in any sample? False where the numbers can't be read."""
    if torch.compiler.is_compiling():
        return False
    with untracked(), torch._C._DisableFuncTorch():
        tensor = below_transforms(tensor)
        if type(tensor) is not Tensor or tensor.is_meta or _len_torch_dispatch_stack():
            return False
        tensor = tensor.detach()
        # a sum takes no memory, and is nan for infinities of both signs as well
        return isnan(tensor.sum().item()) and bool(tensor.isnan().any())


def sweep_batch(
    sweep: Callable[[Leaves], tuple[Leaves, Leaves]],
    seeds: Leaves,
    randomness: str = "same",
    dims: Sequence[int | None] | None = None,
) -> tuple[Leaves, Leaves]:
    """``torch.vmap`` over a dimension of flat seeds, the first by default, at less overhead.

    ``sweep(seed) -> (products, rest)``. Products come back as ``[K, *shape]``; ``rest``, which
    should not depend on the seed, comes back as it is for the first seed.
    """
    dims = (0,) * len(seeds) if dims is None else dims
    if {*map(type, seeds)} != {Tensor}:
        check_plain(seeds)
    if torch.compiler.is_compiling():
        return _sweep_batch_traceably(sweep, seeds, randomness, dims)
    size = next(s.shape[d] for s, d in zip(seeds, dims, strict=True) if d is not None)
    level = _functorch._vmap_increment_nesting(size, randomness)
    wrap, unwrap = _functorch._add_batch_dim, _functorch._remove_batch_dim
    try:
        pairs = zip(seeds, dims, strict=True)
        products, rest = sweep(tuple([s if d is None else wrap(s, d, level) for s, d in pairs]))
        every = tuple([unwrap(product, level, size, 0) for product in products])
        if not rest:
            return every, ()
        shared = [unwrap(x, level, size, 0)[0] if _is_batched(x, level) else x for x in rest]
        return every, tuple(shared)
    finally:
        _functorch._vmap_decrement_nesting()


def _sweep_batch_traceably(
    sweep: Callable[[Leaves], tuple[Leaves, Leaves]],
    seeds: Leaves,
    randomness: str,
    dims: Sequence[int | None],
) -> tuple[Leaves, Leaves]:
    """:func:`sweep_batch` by torch.vmap itself, which the compiler can trace."""
    in_dims: Any = (tuple(dims),)
    batched: Any = torch.vmap(sweep, in_dims=in_dims, randomness=randomness)
    # all comes back with K in front: torch.vmap refuses what a vmap outside batches otherwise
    products, rest = batched(seeds)
    return products, tuple([x[0] for x in rest])


def _is_batched(tensor: Tensor, level: int) -> bool:
    is_wrapped = _functorch.is_batchedtensor(tensor)
    return is_wrapped and _functorch.maybe_get_level(tensor) == level
