"""Rows of a Jacobian that are kept as factors, for the value, ``J Jᵀ`` and products with ``Jᵀ``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from jacfunc._factored import FactoredJacobian, Part, as_known, place_of, rows
from jacfunc._kernels.answers import Answers
from jacfunc._kernels.blocks import KeptAxes, LeafRows, leaf_rows
from jacfunc._lending import versions_of
from jacfunc._lock import kept_property
from jacfunc._products import FactoredProducts
from jacfunc._rounding import contracting
from jacfunc._types import Leaves
from jacfunc.layers import Form, Gather, Outer, Rows

EVERY_AXIS = KeptAxes((), ())
"""Each output of a sample has a row, and a column, of its own."""

Place: TypeAlias = tuple[Callable[[Form], Part], Callable[..., Form], list[tuple[int, torch.Size]]]
"""What makes a part of its form, what makes that of tensors, and which these are, in what shape."""


class KeptRows(tuple[Tensor, ...]):
    """All rows of the only output ``[B, *out]`` as factors: a tuple of tensors.

    The first is the output, the others are what forms are made of. So a written sweep may give
    them, too: what else there is to know is the same at each evaluation that it holds for.
    """

    _places: list[list[Place]]
    _answers: Answers
    """What is made of rows like these."""
    _versions: Sequence[int]

    @classmethod
    @torch.no_grad()
    def of(cls, jacobian: FactoredJacobian, _: Leaves = ()) -> KeptRows:
        """From one sweep of evaluated samples."""
        (every,) = leaf_rows(jacobian, EVERY_AXIS)
        tensors, numbers = [jacobian.outputs[0]], dict[Hashable, int]()
        places: list[list[Place]] = [[] for _ in every.parts]
        for parts, into in zip(every.parts, places, strict=True):
            for part in parts:
                factors, form_of, taken = *_divided(part.form), list[tuple[int, torch.Size]]()
                for tensor in factors:  # a weight and its bias have cotangents in common
                    number = numbers.setdefault(place_of(tensor), len(tensors))
                    tensors += [tensor] if number == len(tensors) else []
                    taken.append((number, tensor.shape))
                into.append((partial(Part, part.path), form_of, taken))
        return cls._like(places, Answers(), tensors)

    @classmethod
    def _like(cls, places: list[list[Place]], answers: Answers, tensors: Sequence[Tensor]) -> Self:
        own = cls([x.detach() for x in tensors])  # inputs of layers would keep the graph
        own._places, own._answers, own._versions = places, answers, versions_of(own)
        return own

    @property
    def like(self) -> Callable[[Sequence[Tensor]], KeptRows]:
        """Makes rows like these of other tensors."""
        return partial(self._like, self._places, self._answers)

    @property
    def output(self) -> Tensor:
        """What the module has returned."""
        return self[0]

    @property
    def are_as_kept(self) -> bool:
        """Was nothing of it written into since? A module may multiply by tensors of others."""
        return versions_of(self) == self._versions

    @kept_property
    def parts(self) -> list[list[Part]]:
        """The parts of each parameter's Jacobian."""
        return [
            [
                part_of(form_of(*[self[number].view(shape) for number, shape in taken]))
                for part_of, form_of, taken in places
            ]
            for places in self._places
        ]

    def gram(self, params: Leaves, center: bool, dtype: torch.dtype) -> Tensor:
        """``J Jᵀ`` as a matrix; centred, it is first added up in float64."""

        def made() -> Leaves:
            size, *shape = self.output.shape
            every = LeafRows(self.parts, params, size, [(), tuple(shape), ()], self.output)
            with contracting(params):
                kernel = every.times(every, torch.float64 if center else dtype)
                return (as_matrix(kernel, center, dtype),)

        return self._answers.made(("gram", center, dtype), made, (*self, *params))[0]

    def blocks(self, params: Leaves, samples: slice) -> list[Tensor]:
        """Rows of some samples, written out: ``[B, C, *param]`` of each parameter."""
        lead = len(self.output[samples]), self.output.shape[1:].numel()
        with contracting(params):
            return [
                rows(
                    [part.of_samples(samples, slice(None)) for part in parts],
                    partial(param.new_zeros, (*lead, *param.shape)),
                )
                for parts, param in zip(self.parts, params, strict=True)
            ]

    def pulled(self, params: Leaves, cotangent: Tensor) -> Leaves:
        """``Jᵀ u`` of one u like the output."""

        def made() -> Leaves:
            with contracting(params):
                products = FactoredProducts(self.parts, params)
                return products.pulled(cotangent.reshape(len(self.output), -1).T)

        return self._answers.made("pulled", made, (*self, *params, cotangent))


def as_matrix(kernel: Tensor, center: bool, dtype: torch.dtype) -> Tensor:
    """A kernel ``[B, B, *out, *out]`` as a matrix of the rows of J, centred in its own dtype."""
    first, second, *out = kernel.shape
    width = torch.Size(out[: len(out) // 2]).numel()
    blocks: Tensor = kernel.reshape(first, second, width, width).transpose(1, 2)  # [B, C, B, C]
    if center:
        blocks = blocks - blocks.mean(0)
        blocks -= blocks.mean(2, keepdim=True)
    return blocks.reshape(first * width, second * width).to(dtype)


def _divided(form: Form) -> tuple[Leaves, Callable[..., Form]]:
    """The tensors that a form is made of, and what makes one like it of others."""
    form = as_known(form)
    if isinstance(form, Outer):
        made: Any = partial(Outer, shape=form.shape, is_transposed=form.is_transposed)
        return (form.inputs, form.cotangents), made
    if isinstance(form, Gather):
        return (form.index, form.cotangents), partial(Gather, shape=form.shape)
    return (form.products,), Rows
