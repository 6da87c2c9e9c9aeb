"""The Jacobian of all samples of a batch, with the part of each parameter as factors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from jacfunc._assembly import shared_units
from jacfunc._factored.derived import Derived, parameters_of
from jacfunc._factored.parts import Part, merged, rows, write
from jacfunc._factored.use import Use, UsedPart
from jacfunc._linear_map import EVERY, LeafNumbers
from jacfunc._types import Leaves
from jacfunc.layers import Rows

_HAS_GRAPH = attrgetter("requires_grad")


class Pullbacks(Protocol):
    """Evaluated outputs, and the pullback of K cotangents at once."""

    @property
    def outputs(self) -> Leaves:
        """Differentiable leaves of what the function returned."""
        ...

    @property
    def extras(self) -> Leaves:
        """Other tensors that it returned."""
        ...

    def pull_batch(
        self, cotangents: Leaves, onto: slice = EVERY, of: LeafNumbers = EVERY
    ) -> Leaves:
        """Products, with K in front, of cotangents ``of`` some outputs."""
        ...


@dataclass(eq=False)
class Direct:
    """A primal that is differentiated by autograd alone, without a rule for a layer.

    Args:
        number: its number among all primals.
        dim: the dimension in which it holds the samples; None if it belongs to one sample alone.
    """

    number: int
    dim: int | None = 0

    def rows(self, product: Tensor) -> Rows:
        """The rows of its Jacobian."""
        return Rows(product.unsqueeze(1) if self.dim is None else product.movedim(self.dim + 1, 1))


@dataclass(eq=False)
class FactoredJacobian:
    """An evaluation of all samples; cotangents are pulled back onto the operations with parameters.

    Args:
        size: how many samples were evaluated.
        uses: the operations with rules that use parameters.
        direct: primals that are differentiated as they are: inputs, and parameters that are used
            where no rule sees it.
        params: all primals, as one sample has them.
        linearization: the map of cotangents of the outputs to those of the uses' outputs, and of
            the direct primals.
        derived: results that all samples share, by the numbers that they have beside parameters.
        rest: another map of the same outputs' cotangents, and what it leads to directly.
        signature: equal for evaluations that called the same operations.
        moves_samples: were numbers moved to where other numbers say?
        moves_unseen: are these other numbers not all in the signature?
        reads_values: did Python read numbers, which may tell another thing of each sample alone?
        apart: numbers of samples of which it would have read something else of each alone.
    """

    size: int
    uses: Sequence[Use]
    direct: Sequence[Direct]
    params: Leaves
    linearization: Pullbacks
    derived: Mapping[int, Derived] = field(default_factory=dict)
    rest: tuple[Pullbacks, Sequence[Direct]] | None = None
    signature: int = 0
    moves_samples: bool = False
    moves_unseen: bool = False
    reads_values: bool = False
    apart: Collection[int] = ()
    outputs: Leaves = field(init=False)
    """The outputs of all samples, ``[B, *out]``."""
    extras: Leaves = field(init=False)
    """What the function returned beside the outputs, ``[B, …]``."""

    def __post_init__(self) -> None:
        self.outputs, self.extras = self.linearization.outputs, self.linearization.extras

    @cached_property
    def sample_outputs(self) -> Leaves:
        """The outputs of one sample."""
        return tuple([_first(out) for out in self.outputs])

    @property
    def sample_extras(self) -> Leaves:
        """The extras that the call of one sample returned beside the outputs."""
        return tuple([_first(extra) for extra in self.extras])

    @property
    def carries_graph(self) -> bool:
        """Can the outputs, and so their Jacobian, be differentiated further?"""
        return any(map(_HAS_GRAPH, self.outputs))

    @property
    def is_direct(self) -> bool:
        """Are all primals differentiated as they are, each at one place?"""
        return not self.uses and self.rest is None

    @property
    def nbytes(self) -> int:
        """The bytes of what one row's cotangents are pulled back to."""
        others = sum(self.params[x.number].nbytes for x in self._every_direct) * self.size
        return others + sum(use.nbytes for use in self.uses)

    @property
    def _every_direct(self) -> Sequence[Direct]:
        return self.direct if self.rest is None else [*self.direct, *self.rest[1]]

    def rows(self, start: int, stop: int, of: int) -> Leaves:
        """Rows of output leaf number ``of``, written out: ``[B, K, *param]`` of each parameter."""
        lead = (self.size, stop - start)
        pairs = zip(self.params, self.parts_of_rows(start, stop, of), strict=True)
        with self.contracting():
            return tuple(
                rows(parts, partial(param.new_zeros, (*lead, *param.shape)))
                for param, parts in pairs
            )

    def write(self, parts: Sequence[list[Part]], blocks: Sequence[Tensor]) -> None:
        """Write the rows of each parameter into a tensor ``[B, K, *param]``, or a part of one."""
        with self.contracting():
            for param_parts, block in zip(parts, blocks, strict=True):
                write(param_parts, block)

    def write_rows(
        self,
        cotangents: Leaves,
        blocks: Callable[[], Sequence[Tensor]],
        of: LeafNumbers = EVERY,
    ) -> None:
        """Pull back cotangents ``[K, B, *out]``, and write the rows of each parameter.

        The parts of a parameter are merged when it is its turn, and go once they are written: those
        of all parameters, merged and not, would otherwise lie beside the blocks.

        Args:
            blocks: returns tensors ``[B, K, *param]``, or parts of some. It is called after the
                sweep, whose memory is free again then.
        """
        of_params = self._parts_by_use(cotangents, of)
        places = blocks()
        with self.contracting():
            for place in places:
                write(of_params.pop(0), place)

    def parts_of_rows(self, start: int, stop: int, of: int) -> list[list[Part]]:
        """Rows of output leaf number ``of``, as the parts of each parameter's Jacobian."""
        alone = slice(of, of + 1)
        return self.parts_of_cotangents(shared_units(self.outputs[alone], start, stop), alone)

    def parts_of_cotangents(self, cotangents: Leaves, of: LeafNumbers = EVERY) -> list[list[Part]]:
        """Pull back cotangents ``[K, B, *out]`` of some outputs or all, as parts by parameter."""
        with self.contracting():
            every = self._parts_by_use(cotangents, of)
            return [merged(parts) if len(parts) > 1 else parts for parts in every]

    def _parts_by_use(self, cotangents: Leaves, of: LeafNumbers) -> list[list[Part]]:
        """The parts of each parameter, one for each use."""
        if not cotangents or not len(cotangents[0]) or not self.size:
            return [[] for _ in self.params]
        products = self.linearization.pull_batch(cotangents, EVERY, of)
        others = self.rest[0].pull_batch(cotangents, EVERY, of) if self.rest else ()
        numbers = range(len(self.params))
        by_number: dict[int, list[Part]] = {number: [] for number in (*numbers, *self.derived)}
        with self.contracting():
            for use, product in zip(self.uses, products, strict=False):
                _add(by_number, use.parts, use.place(product))
            directly = (*products[len(self.uses) :], *others)
            for direct, product in zip(self._every_direct, directly, strict=True):
                by_number[direct.number].append(Part((), direct.rows(product)))
            for number in reversed([*self.derived]):  # each is made of parameters and earlier ones
                if parts := by_number[number]:
                    derived = self.derived[number]
                    shape = (self.size, len(cotangents[0]), *derived.value.shape)
                    seeds = rows(merged(parts), partial(derived.value.new_zeros, shape))
                    _add(by_number, derived.parts, seeds.transpose(0, 1))
        return [by_number[number] for number in numbers]

    def params_of(self, operations: Container[int]) -> set[int]:
        """Numbers of the parameters that operations with these numbers use."""
        parts = [part for use in self.uses if use.key[0] in operations for part in use.parts]
        for result in self.derived.values():
            parts += result.parts if result.key[0] in operations else ()
        numbers = [number for number, _, _ in parts]
        return parameters_of(numbers, self.derived)

    def contracting(self) -> AbstractContextManager[Any]:
        """A context in which products are recorded only if the Jacobian is differentiated further.

        Inputs of layers always have a graph, which would make products have one.
        """
        return torch.set_grad_enabled(self.carries_graph)


def _first(leaf: Tensor) -> Tensor:
    """The first sample of a leaf; zeros like it, if there is none."""
    return leaf.select(0, 0) if len(leaf) else leaf.new_zeros(leaf.shape[1:])


def _add(by_number: Mapping[int, list[Part]], parts: Sequence[UsedPart], seeds: Tensor) -> None:
    """Add the form of each part, made from cotangents ``[K, B, *z]`` of the operation's result."""
    for number, path, form_of in parts:
        by_number[number].append(Part(path, form_of(seeds)))
