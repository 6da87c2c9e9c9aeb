"""Sums of squares of a factored Jacobian's entries, without writing the Jacobian out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from jacfunc._factored.parts import Part, rows
from jacfunc._memory import SQUARED_BYTES
from jacfunc.layers import Form, Gather, Outer, Rows

KnownForm: TypeAlias = Outer | Gather | Rows


class SquaredSums:
    """Keeps sums ``Σₖ Gₖ²`` of cotangents, which the weight and the bias of a layer share."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}

    def of(self, left: Tensor) -> Tensor:
        """The sum over k of the squares of cotangents ``[K, B, …]``."""
        if not left.is_contiguous():
            return _sum_of_products(left)
        flat = left.reshape(len(left), -1)
        place = flat.data_ptr(), flat.shape
        if place not in self._sums:
            # kept with the cotangents, so that nothing else comes to lie at their address
            self._sums[place] = flat, _sum_of_products(flat)
        return self._sums[place][1].view(left.shape[1:])


def squared(
    parts: Sequence[Part], param: Tensor, sums: SquaredSums, at_once: int = SQUARED_BYTES
) -> Tensor:
    """``Σ_{b,k} J[b, k]²`` of one parameter, ``[*param]``, with ``at_once`` bytes written out."""
    if len(parts) == 1 and not parts[0].path:
        return _squared(_as_known(parts[0].form, param), sums, at_once).view(param.shape)
    if _are_disjoint(parts, param):
        forms = [(part, _as_known(part.form, param)) for part in parts]
        return placed([(part, _squared(form, sums, at_once)) for part, form in forms], param)
    total = torch.zeros_like(param, requires_grad=False)
    for block in written(parts, param, at_once):
        total = total + block.square().sum((0, 1))
    return total


def norms(parts: Sequence[Part], param: Tensor, at_once: int = SQUARED_BYTES) -> Tensor:
    """``|J[b, k]|²`` of one parameter, ``[K, B]``, with ``at_once`` bytes written out."""
    if _are_disjoint(parts, param):
        return torch.stack([_norms(_as_known(part.form, param), at_once) for part in parts]).sum(0)
    blocks = written(parts, param, at_once)
    return torch.cat([b.square().reshape(*b.shape[:2], -1).sum(2) for b in blocks]).t()


def written(parts: Sequence[Part], param: Tensor, at_once: int = SQUARED_BYTES) -> Iterator[Tensor]:
    """The parts written out, ``[b, K, *param]``, for as many samples at a time as fit."""
    forms = [_as_known(part.form, param) for part in parts]
    num_seeds, size = _seeds(forms[0]).shape[:2]
    step = _samples_within(at_once, num_seeds * param.numel() * param.element_size())
    for start in range(0, size, step):
        stop = min(start + step, size)
        chunk = [
            Part(part.path, form.of_samples(slice(start, stop)))
            for part, form in zip(parts, forms, strict=True)
        ]
        shape = (stop - start, num_seeds, *param.shape)
        yield rows(chunk, partial(_seeds(forms[0]).new_zeros, shape))


def placed(values_of_parts: Sequence[tuple[Part, Tensor]], param: Tensor) -> Tensor:
    """A tensor like the parameter, in which the values of each part are added in its place."""
    block = values_of_parts[0][1].new_zeros((1, 1, *param.shape))
    for part, values in values_of_parts:
        part.place_in(block).add_(values)
    return block[0, 0]


def _are_disjoint(parts: Sequence[Part], param: Tensor) -> bool:
    """Is no entry of the parameter in two parts? Then squares have no cross terms."""
    if len(parts) == 1:
        return True
    entries = torch.stack([part.entries(param.shape) for part in parts])
    return bool((entries.sum(0) <= 1).all())


def _squared(form: KnownForm, sums: SquaredSums, at_once: int) -> Tensor:
    """``Σ_{b,k}`` of the squared entries of a form, in the shape of the part."""
    if isinstance(form, Gather):
        return _squared_gather(form)
    if isinstance(form, Rows):
        return sums.of(form.products).sum(0)
    num_seeds, _, _, positions, outs = form.cotangents.shape
    ins, pairs = form.width, positions * (positions + 1) // 2
    by_pairs = pairs * (outs * ins + num_seeds * outs + ins)
    by_rows = num_seeds * outs * ins * (positions + 1)
    is_cheaper = by_pairs < by_rows
    total = _squared_by_pairs(form, sums) if is_cheaper else _squared_by_rows(form, at_once)
    return (total.mT if form.is_transposed else total).reshape(form.shape)


def _squared_by_pairs(form: Outer, sums: SquaredSums) -> Tensor:
    """``Σ_{t,s} (G_t · G_s) ⊗ (A_t · A_s)``, each pair of positions once: ``[groups, O, I]``."""
    left, right = form.cotangents, form.inputs.to(form.cotangents.dtype)
    positions = left.shape[3]
    if positions == 1:
        lefts, rights = sums.of(left), right.square()
    else:
        first, second = torch.triu_indices(positions, positions, device=left.device)
        lefts = _sum_of_products(left, first, second)
        twice = torch.where(first == second, 1, 2).to(left.dtype).unsqueeze(-1)
        rights = right[:, :, first] * right[:, :, second] * twice
    lefts, rights = (x.transpose(0, 1).flatten(1, 2) for x in (lefts, rights))
    return torch.bmm(lefts.mT, rights)


def _sum_of_products(left: Tensor, *pairs: Tensor) -> Tensor:
    """``Σₖ G[k, …, first] G[k, …, second]``, for one k after the other, to save memory."""
    total: Tensor | None = None
    for seed in left:
        factors = [seed[:, :, places] for places in pairs] if pairs else [seed, seed]
        if total is None:
            total = factors[0] * factors[1]
        else:
            total.addcmul_(*factors)
    assert total is not None
    return total


def _squared_by_rows(form: Outer, at_once: int) -> Tensor:
    """The rows written out and squared, few samples at a time: ``[groups, O, I]``."""
    blocks = (block.square_().sum((0, 2)) for block in _blocks(form, at_once))
    total = next(blocks)
    for block in blocks:
        total += block
    return total


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


def _norms(form: KnownForm, at_once: int) -> Tensor:
    """The squared norms of a form's rows, ``[K, B]``."""
    if isinstance(form, Gather):
        return (form.cotangents * _summed_by_row(form)).sum((2, 3))
    if isinstance(form, Rows):
        return (
            form.products.square().flatten(2).sum(2)
            if form.products.dim() > 2
            else (form.products.square())
        )
    num_seeds, _, _, positions, outs = form.cotangents.shape
    ins = form.width
    by_pairs = positions * positions * (ins + num_seeds * outs)
    if by_pairs > num_seeds * outs * ins * (positions + 1):
        return torch.cat([block.square_().sum((1, 3, 4)) for block in _blocks(form, at_once)]).t()
    left, right = form.cotangents, form.inputs.to(form.cotangents.dtype)
    if positions == 1:
        return (left.square().sum((3, 4)) * right.square().sum((2, 3))).sum(2)
    return ((left @ left.mT) * (right @ right.mT)).sum((2, 3, 4))


def _as_known(form: Form, param: Tensor) -> KnownForm:
    """The form in the parameter's precision at least; rows if the form is none of the three."""
    if isinstance(form, Outer):
        seeds = _precise(form.cotangents, param)
        if seeds is form.cotangents:
            return form  # a convolution may have nothing unfolded yet
        return Outer(form.inputs, seeds, form.shape, form.is_transposed)
    if isinstance(form, Gather):
        return Gather(form.index, _precise(form.cotangents, param), form.shape)
    products = form.products if isinstance(form, Rows) else form.rows().transpose(0, 1)
    return Rows(_precise(products, param))


def _precise(seeds: Tensor, param: Tensor) -> Tensor:
    """The seeds in the parameter's precision at least."""
    return seeds.to(torch.promote_types(seeds.dtype, param.dtype))


def _seeds(form: KnownForm) -> Tensor:
    """The cotangents of a form, or its rows: ``[K, B, …]``."""
    return form.products if isinstance(form, Rows) else form.cotangents


def _samples_within(nbytes: int, bytes_of_one: int) -> int:
    """How many samples fit, one at least."""
    return max(1, nbytes // max(1, bytes_of_one))
