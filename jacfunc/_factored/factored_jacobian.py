"""The Jacobian of all samples of a batch, with the part of each parameter as factors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacfunc._assembly import shared_units
from jacfunc._factored.parts import Part, merged, rows, write
from jacfunc._factored.use import Use
from jacfunc._linear_map import EVERY, LeafNumbers, Linearization, Samples
from jacfunc._types import Leaves
from jacfunc.layers import Rows


@dataclass(frozen=True)
class FactoredJacobian:
    """An evaluation of all samples; cotangents are pulled back onto the operations with parameters.

    Args:
        samples: the samples that were evaluated.
        uses: the operations with rules that use parameters.
        others: numbers of the parameters that are used where no rule sees it. They are
            differentiated as they are, with a copy for each sample.
        params: all parameters.
        linearization: the map of cotangents of the outputs to those of the uses' outputs, and of
            ``others``.
    """

    samples: Samples
    uses: Sequence[Use]
    others: Sequence[int]
    params: Leaves
    linearization: Linearization

    @property
    def outputs(self) -> Leaves:
        """The outputs of all samples, ``[B, *out]``."""
        return self.linearization.outputs

    @property
    def sample_outputs(self) -> Leaves:
        """The outputs of one sample."""
        return tuple(out[0] for out in self.outputs)

    @property
    def carries_graph(self) -> bool:
        """Can the outputs, and so their Jacobian, be differentiated further?"""
        return any(out.requires_grad for out in self.outputs)

    @property
    def nbytes(self) -> int:
        """The bytes of what one row's cotangents are pulled back to."""
        others = sum(self.params[i].nbytes for i in self.others) * self.samples.size
        return others + sum(use.nbytes for use in self.uses)

    @property
    def sample_extras(self) -> Leaves:
        """The extras that the call of one sample returned beside the outputs."""
        return tuple(extra[0] for extra in self.linearization.extras)

    def rows(self, start: int, stop: int, of: int) -> Leaves:
        """Rows of output leaf number ``of``, written out: ``[B, K, *param]`` of each parameter."""
        lead = (self.samples.size, stop - start)
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

    def parts_of_rows(self, start: int, stop: int, of: int) -> list[list[Part]]:
        """Rows of output leaf number ``of``, as the parts of each parameter's Jacobian."""
        alone = slice(of, of + 1)
        return self.parts_of_cotangents(shared_units(self.outputs[alone], start, stop), alone)

    def parts_of_cotangents(self, cotangents: Leaves, of: LeafNumbers = EVERY) -> list[list[Part]]:
        """Pull back cotangents ``[K, B, *out]`` of some outputs or all, as parts by parameter."""
        if not cotangents or not len(cotangents[0]):
            return [[] for _ in self.params]
        products = self.linearization.pull_batch(cotangents, EVERY, of)
        parts: list[list[Part]] = [[] for _ in self.params]
        with self.contracting():
            for use, product in zip(self.uses, products, strict=False):
                seeds = use.cotangents(product)
                for number, path, form_of in use.forms:
                    parts[number].append(Part(path, form_of(seeds)))
            for number, product in zip(self.others, products[len(self.uses) :], strict=True):
                rows = product if self.samples.is_mapped else product.unsqueeze(1)
                parts[number].append(Part((), Rows(rows)))
            return [merged(param_parts) for param_parts in parts]

    def contracting(self) -> AbstractContextManager[Any]:
        """A context in which products are recorded only if the Jacobian is differentiated further.

        Inputs of layers always have a graph, which would make products have one.
        """
        return torch.set_grad_enabled(self.carries_graph)
