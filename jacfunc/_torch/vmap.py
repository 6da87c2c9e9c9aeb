"""Tensors under a vmap, seen from below: as of all samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isnan
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _functorch, _len_torch_dispatch_stack
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from jacfunc._arguments import check_plain
from jacfunc._errors import Refused
from jacfunc._torch.levels import below_transforms
from jacfunc._types import Leaves

Level: TypeAlias = tuple[_functorch.TransformType, int] | None
"""A transform that is active; None where there is none."""


def innermost() -> Level:
    """The transform that sees operations first."""
    top = _functorch.peek_interpreter_stack()
    return None if top is None else (top.key(), top.level())


def mapped(tensor: Tensor, level: Level) -> tuple[Tensor, int | None]:
    """The tensor of all samples, and which of its dimensions they are; None if it has none."""
    if level is None or not _functorch.is_batchedtensor(tensor):
        return tensor, None
    if _functorch.maybe_get_level(tensor) != level[1]:
        return tensor, None
    return _functorch.get_unwrapped(tensor), _functorch.maybe_get_bdim(tensor)


def of_samples(tensor: Tensor, size: int, level: Level) -> Tensor:
    """The tensor ``[B, *shape]`` of all samples, also where it is the same for all."""
    values, dim = mapped(tensor, level)
    if dim is None:
        return values.expand(size, *values.shape)
    return values.movedim(dim, 0) if dim else values


def mapped_anyway(tensor: Tensor, size: int, level: Level) -> Tensor:
    """The tensor as one that differs from sample to sample, although it may not."""
    if level is None or mapped(tensor, level)[1] is not None:
        return tensor
    expanded: Tensor = _functorch._add_batch_dim(tensor.expand(size, *tensor.shape), 0, level[1])
    return expanded


def at_once(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], level: Level
) -> Any:
    """A call whose first argument alone differs, and may have the samples in front: below vmap."""
    first, *others = args
    values, dim = mapped(first, level)
    rest = (*others, *kwargs.values())
    if level is None or dim is None or any(_is_mapped(x, level) for x in rest):
        return func(*args, **kwargs)
    with temporarily_pop_interpreter_stack():
        out = func(values.movedim(dim, 0), *others, **kwargs)
        # a write into a view would go by where it came out, which it is differentiated by
        out = out.clone() if out._is_view() else out
    return _functorch._add_batch_dim(out, 0, level[1])


def below_vmap(func: Callable[[Leaves], Leaves], leaves: Leaves) -> Leaves:
    """A function of the leaves ``[B, *shape]`` of all samples, from inside the vmap over them.

    Raises:
        Refused: where vmap is not the innermost transform, or some leaf does not see it.
    """
    level = innermost()
    dims = [mapped(leaf, level)[1] for leaf in leaves]
    if level is None or all(dim is None for dim in dims):
        raise Refused("torch's backward pass of it is wrong inside vmap")
    size = next(
        _functorch.get_unwrapped(leaf).shape[dim]
        for leaf, dim in zip(leaves, dims, strict=True)
        if dim is not None
    )
    every = tuple(of_samples(leaf, size, level) for leaf in leaves)
    with temporarily_pop_interpreter_stack():
        found = func(every)
    return tuple(_functorch._add_batch_dim(x, 0, level[1]) for x in found)


def _is_mapped(value: Any, level: Level) -> bool:
    return isinstance(value, Tensor) and mapped(value, level)[1] is not None


def every_level(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as each level outside sees it, the innermost first."""
    yield tensor
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


def is_spread(tensor: Tensor) -> bool:
    """Does a vmap outside map it, whose samples do not lie one after the other, each in a row?"""
    is_mapped = False
    for seen in every_level(tensor):
        if _functorch.is_batchedtensor(seen):
            is_mapped = True
            if _functorch.maybe_get_bdim(seen):
                return True
    return is_mapped and not below_transforms(tensor).is_contiguous()


def holds_nan(tensor: Tensor) -> bool:
    """Is one of its numbers nan, for whichever sample? False where nobody can look."""
    if torch.compiler.is_compiling():
        return False
    tensor = below_transforms(tensor)
    if type(tensor) is not Tensor or tensor.is_meta or _len_torch_dispatch_stack():
        return False
    with torch._C._DisableFuncTorch():
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

    ``sweep(seed) -> (products, rest)``: products come back as ``[K, *shape]``, the rest, which
    no seed should change, as it was for the first seed.
    """
    dims = (0,) * len(seeds) if dims is None else dims
    check_plain(seeds)
    if torch.compiler.is_compiling():
        return _sweep_batch_traceably(sweep, seeds, randomness, dims)
    size = next(s.shape[d] for s, d in zip(seeds, dims, strict=True) if d is not None)
    level = _functorch._vmap_increment_nesting(size, randomness)
    wrap, unwrap = _functorch._add_batch_dim, _functorch._remove_batch_dim
    try:
        pairs = zip(seeds, dims, strict=True)
        products, rest = sweep(tuple([s if d is None else wrap(s, d, level) for s, d in pairs]))
        return (
            tuple([unwrap(product, level, size, 0) for product in products]),
            tuple([unwrap(x, level, size, 0)[0] if _is_batched(x, level) else x for x in rest]),
        )
    finally:
        _functorch._vmap_decrement_nesting()


def _sweep_batch_traceably(
    sweep: Callable[[Leaves], tuple[Leaves, Leaves]],
    seeds: Leaves,
    randomness: str,
    dims: Sequence[int | None],
) -> tuple[Leaves, Leaves]:
    """The same by torch.vmap itself, which the compiler knows."""
    in_dims: Any = (tuple(dims),)
    out_dims: Any = (0, None)
    batched: Any = torch.vmap(sweep, in_dims=in_dims, out_dims=out_dims, randomness=randomness)
    products, rest = batched(seeds)
    return products, rest


def _is_batched(tensor: Tensor, level: int) -> bool:
    is_wrapped = _functorch.is_batchedtensor(tensor)
    return is_wrapped and _functorch.maybe_get_level(tensor) == level
