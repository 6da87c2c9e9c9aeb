"""A batch of samples on one graph, with each parameter's Jacobian kept as factors."""

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
    """An evaluation of all samples, to pull cotangents back from onto the uses of parameters.

    Args:
        others: parameters that are used where no rule sees it: these are differentiated as they
            are, one a sample.
    """

    samples: Samples
    uses: Sequence[Use]
    others: Sequence[int]
    params: Leaves
    linearization: Linearization

    @property
    def outputs(self) -> Leaves:
        """``[B, *out]``."""
        return self.linearization.outputs

    @property
    def of_one(self) -> Leaves:
        """The outputs of one sample."""
        return tuple(out[0] for out in self.outputs)

    @property
    def carries_graph(self) -> bool:
        """Are the outputs, and so their Jacobian, differentiated further?"""
        return any(out.requires_grad for out in self.outputs)

    @property
    def nbytes(self) -> int:
        """Of what one row's cotangents become at all uses."""
        others = sum(self.params[i].nbytes for i in self.others) * self.samples.size
        return others + sum(use.nbytes for use in self.uses)

    @property
    def extras_of_one(self) -> Leaves:
        """What one sample's call returned beside them."""
        return tuple(extra[0] for extra in self.linearization.extras)

    def rows(self, start: int, stop: int, of: int) -> Leaves:
        """These rows of the Jacobian of output leaf number ``of``, ``[B, K, *param]``."""
        lead = (self.samples.size, stop - start)
        pairs = zip(self.params, self.of_rows(start, stop, of), strict=True)
        with self.contracting():
            return tuple(
                rows(parts, partial(param.new_zeros, (*lead, *param.shape)))
                for param, parts in pairs
            )

    def write(self, parts: Sequence[list[Part]], blocks: Sequence[Tensor]) -> None:
        """Rows by parameter into tensors ``[B, K, *param]``, or parts of these."""
        with self.contracting():
            for some, block in zip(parts, blocks, strict=True):
                write(some, block)

    def of_rows(self, start: int, stop: int, of: int) -> list[list[Part]]:
        """What gives these rows of the Jacobian of one output leaf, by parameter."""
        alone = slice(of, of + 1)
        return self.of_cotangents(shared_units(self.outputs[alone], start, stop), alone)

    def of_cotangents(self, cotangents: Leaves, of: LeafNumbers = EVERY) -> list[list[Part]]:
        """The same of cotangents ``[K, B, *out]`` that need not be rows, of some outputs or all."""
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
            return [merged(found) for found in parts]

    def contracting(self) -> AbstractContextManager[Any]:
        """What went into layers leads to parameters, whether anyone goes on from there or not."""
        return torch.set_grad_enabled(self.carries_graph)
