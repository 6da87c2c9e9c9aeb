"""Sums of squares of a factored Jacobian's entries, without writing the Jacobian out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from jacfunc._factored.parts import KnownForm, Part, are_disjoint, as_known, placed, rows
from jacfunc._memory import SQUARED_BYTES
from jacfunc._types import product_dtype
from jacfunc.layers import Form, Gather, Outer, Rows

Sums: TypeAlias = dict[Hashable, tuple[Tensor, Tensor]]
"""Cotangents by place, which a weight and its bias share, with the sums of their squares."""

MOVED, PAIRED = 8, 64
"""How many multiplications take as long as to write a number and read it again; and how many take
as long as to multiply two numbers that are looked up in tables."""


def add_squares(
    totals: dict[str, Tensor],
    params: Mapping[str, tuple[Sequence[Part], Tensor]],
    at_once: int = SQUARED_BYTES,
) -> None:
    """Add ``Σ_{b,k} J[b, k]²`` of each parameter to its total, ``[*param]``, if there is one yet.

    ``params`` are the parts of each parameter's Jacobian, and the parameter.
    """
    sums: Sums = {}
    for name, (parts, param) in params.items():
        squares = _squared_parts(parts, param, sums, at_once)
        totals[name] = totals[name].add_(squares) if name in totals else squares


def _squared_parts(parts: Sequence[Part], param: Tensor, sums: Sums, at_once: int) -> Tensor:
    if len(parts) == 1 and not parts[0].path:
        total = _squared(_in_product_dtype(parts[0].form, param), sums, at_once).view(param.shape)
    elif len(parts) == 1 or are_disjoint(parts, param):
        forms = [(part, _in_product_dtype(part.form, param)) for part in parts]
        total = placed([(part, _squared(form, sums, at_once)) for part, form in forms], param)
    else:
        blocks = written(parts, param, at_once)
        total = reduce(Tensor.add_, (block.square().sum((0, 1)) for block in blocks))
    return total.to(param.dtype)


def norms(params: Iterable[tuple[Sequence[Part], Tensor]], at_once: int = SQUARED_BYTES) -> Tensor:
    """``|J[b]|`` over cotangents and parameters that have parts, ``[B]``, in the dtype of products.

    Args:
        params: the parts of each parameter's Jacobian, and the parameter.
        at_once: bytes of rows that are written out at once.
    """
    squares, lengths, beside = list[Tensor](), list[Tensor](), list[Tensor]()
    outers = dict[Hashable, tuple[Tensor, Tensor]]()  # cotangents by place, with their norms
    for parts, param in params:
        if len(parts) > 1 and not are_disjoint(parts, param):
            blocks = written(parts, param, at_once)
            lengths.append(torch.cat([_lengths(block, 0) for block in blocks]))
            continue
        for form in [_in_product_dtype(part.form, param) for part in parts]:
            if isinstance(form, Rows):
                beside.append(form.products)
            elif _has_one_position(form):
                seeds, inputs = form.cotangents, form.inputs.to(form.cotangents.dtype)
                if (place := place_of(seeds)) not in outers:
                    outers[place] = seeds, _lengths(seeds, 1)
                lengths.append(outers[place][1] * _lengths(inputs, 0))
            elif isinstance(form, Outer) and not _is_by_pairs(form):
                blocks = _blocks(form, at_once)
                lengths.append(torch.cat([_lengths(block, 0) for block in blocks]))
            else:
                squares.append(_squared_norms(form))
    others = list[Tensor]()
    for products in beside:
        if outer := outers.get(place_of(products)) if outers else None:
            lengths.append(outer[1])  # the same cotangents, times the number 1
        else:
            others.append(products.transpose(0, 1).flatten(1))
    if len(others) > 1 and sum(products.nbytes for products in others) <= at_once:
        others = [torch.cat(others, 1)]
    lengths += [_lengths(products, 0) for products in others]
    if squares:  # whose sum may be rounded to less than zero
        lengths.append(reduce(torch.add, squares).clamp(min=0).sqrt())
    return _lengths(torch.stack(lengths), 1)


def written(parts: Sequence[Part], param: Tensor, at_once: int = SQUARED_BYTES) -> Iterator[Tensor]:
    """The parts written out, ``[b, K, *param]``, for as many samples at a time as fit."""
    forms = [_in_product_dtype(part.form, param) for part in parts]
    num_seeds, size = _seeds(forms[0]).shape[:2]
    step = _samples_within(at_once, num_seeds * param.numel() * param.element_size())
    for start in range(0, size, step):
        some, pairs = slice(start, start + step), zip(parts, forms, strict=True)
        chunk = [Part(part.path, form.of_samples(some)) for part, form in pairs]
        shape = (min(step, size - start), num_seeds, *param.shape)
        yield rows(chunk, partial(_seeds(forms[0]).new_zeros, shape))


def _squared(form: KnownForm, sums: Sums, at_once: int) -> Tensor:
    """``Σ_{b,k}`` of the squared entries of a form, in the shape of the part."""
    if isinstance(form, Gather):
        return _squared_gather(form)
    if isinstance(form, Rows):
        return _summed(form.products, sums).sum(0)
    if _has_one_position(form):
        left, right = form.cotangents, form.inputs.to(form.cotangents.dtype)
        total = _summed(left, sums).flatten(1).mT @ right.flatten(1).square()
        return (total.mT if form.is_transposed else total).reshape(form.shape)
    num_seeds, _, _, positions, outs = form.cotangents.shape
    ins, pairs = form.width, positions * (positions + 1) // 2
    by_pairs = pairs * (outs * ins + PAIRED * (num_seeds * outs + ins))
    by_rows = num_seeds * outs * ins * (positions + MOVED)
    total = _squared_by_pairs(form) if by_pairs < by_rows else _squared_by_rows(form, at_once)
    return (total.mT if form.is_transposed else total).reshape(form.shape)


def place_of(seeds: Tensor) -> Hashable:
    """A key that is equal for cotangents in the same memory, as those of a weight and its bias are.

    It holds only as long as the cotangents are kept: later, other tensors may get their memory.
    """
    sizes = zip(seeds.shape, seeds.stride(), strict=True)
    return seeds.data_ptr(), seeds.dtype, *[pair for pair in sizes if pair[0] != 1]


def _summed(left: Tensor, sums: Sums) -> Tensor:
    """The sum over k of the squares of cotangents ``[K, B, …]``."""
    place = place_of(left)
    if place not in sums:
        # the cotangents are kept, too: no other tensor may get their memory, which the key names
        sums[place] = left, _sum_of_products(left)
    return sums[place][1].view(left.shape[1:])


def _squared_by_pairs(form: Outer) -> Tensor:
    """``Σ_{t,s} (G_t · G_s) ⊗ (A_t · A_s)``, each pair of positions once: ``[groups, O, I]``."""
    left, right = form.cotangents, form.inputs.to(form.cotangents.dtype)
    first, second = torch.triu_indices(left.shape[3], left.shape[3], device=left.device)
    lefts = _sum_of_products(left, first, second)
    twice = torch.where(first == second, 1, 2).to(left.dtype).unsqueeze(-1)
    rights = right[:, :, first] * right[:, :, second] * twice
    lefts, rights = (x.transpose(0, 1).flatten(1, 2) for x in (lefts, rights))
    return torch.bmm(lefts.mT, rights)


def _sum_of_products(left: Tensor, *pairs: Tensor) -> Tensor:
    """``Σₖ G[k, …, first] G[k, …, second]``, for as many k at a time as stay in the cache."""
    num_seeds = left.shape[0]
    of_one = left.nbytes // max(1, num_seeds)
    if pairs:
        of_one = of_one // max(1, left.shape[3]) * len(pairs[0])
    step = _samples_within(SQUARED_BYTES, of_one)
    total: Tensor | None = None
    for seeds in left.split(step) if step < num_seeds else [left]:
        first, second = [seeds[:, :, :, places] for places in pairs] or [seeds, seeds]
        products = (first * second).sum(0)
        total = products if total is None else total.add_(products)
    assert total is not None
    return total


def _squared_by_rows(form: Outer, at_once: int) -> Tensor:
    """The rows written out and squared, few samples at a time: ``[groups, O, I]``."""
    blocks = _blocks(form, at_once)
    return reduce(Tensor.add_, (block.square_().sum((0, 2)) for block in blocks))


def _blocks(form: Outer, at_once: int) -> Iterator[Tensor]:
    """The rows as ``[b, groups, K, O, I]``, few samples at a time."""
    num_seeds, size, groups, positions, outs = form.cotangents.shape
    ins, seeds = form.width, num_seeds * outs
    # rows, and the unfolded inputs and the cotangents that they are made of
    numbers = groups * (seeds * ins + positions * (ins + seeds))
    step = _samples_within(at_once, numbers * form.cotangents.element_size())
    for start in range(0, size, step):
        chunk = form.of_samples(slice(start, start + step))
        left = chunk.cotangents.permute(1, 2, 0, 4, 3).flatten(0, 1).flatten(1, 2)
        right = chunk.inputs.to(left.dtype).flatten(0, 1)
        yield torch.bmm(left, right).view(-1, groups, num_seeds, outs, ins)


def _squared_gather(form: Gather) -> Tensor:
    """``Σ_{b,k}`` of the squared entries of a table, ``[V, D]``."""
    squares = (form.cotangents * _summed_by_row(form)).sum(0)
    total = squares.new_zeros(form.shape)
    return total.index_add_(0, form.index.flatten(), squares.flatten(0, 1))


def _summed_by_row(form: Gather) -> Tensor:
    """``[K, B, T, D]``: at each position the sum over all that look up the same row."""
    is_same = form.index.unsqueeze(2) == form.index.unsqueeze(1)
    return is_same.to(form.cotangents.dtype) @ form.cotangents


def _is_by_pairs(form: Outer) -> bool:
    """Does it take less to look at each pair of positions than to write the rows out?"""
    (num_seeds, _, _, positions, outs), ins = form.cotangents.shape, form.width
    by_pairs = positions * positions * (ins + num_seeds * (outs + MOVED))
    return by_pairs <= num_seeds * outs * ins * (positions + MOVED)


def _squared_norms(form: Outer | Gather) -> Tensor:
    """The squared norms ``[B]`` of what a form is of each sample, from pairs of positions."""
    if isinstance(form, Gather):
        return (form.cotangents * _summed_by_row(form)).sum((0, 2, 3))
    left, right = form.cotangents, form.inputs.to(form.cotangents.dtype)
    return ((left @ left.mT) * (right @ right.mT)).sum((0, 2, 3, 4))


def _lengths(numbers: Tensor, samples: int) -> Tensor:
    """The norms of what each sample has, which are in one of the dimensions."""
    dims = [dim for dim in range(numbers.dim()) if dim != samples]
    return torch.linalg.vector_norm(numbers, dim=dims) if dims else numbers.abs()


def _has_one_position(form: KnownForm) -> TypeGuard[Outer]:
    """Is it an outer product in one group and at one position?"""
    return isinstance(form, Outer) and form.cotangents.shape[2:4] == (1, 1)


def _in_product_dtype(form: Form, param: Tensor) -> KnownForm:
    """The form as a known one, in the dtype of products."""
    known = as_known(form)
    before = _seeds(known)
    is_wide = before.dtype == param.dtype and before.itemsize > 2
    dtype = before.dtype if is_wide else product_dtype(before, param)
    if before.dtype == dtype:
        return known  # a convolution may have nothing unfolded yet
    seeds = before.to(dtype)
    if isinstance(known, Outer):
        return Outer(known.inputs, seeds, known.shape, known.is_transposed)
    return Gather(known.index, seeds, known.shape) if isinstance(known, Gather) else Rows(seeds)


def _seeds(form: KnownForm) -> Tensor:
    """The cotangents of a form, or its rows: ``[K, B, …]``."""
    return form.products if isinstance(form, Rows) else form.cotangents


def _samples_within(nbytes: int, bytes_of_one: int) -> int:
    """How many samples fit, one at least."""
    return max(1, nbytes // max(1, bytes_of_one))
