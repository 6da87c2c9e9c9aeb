"""The judge: answers compared with rows of the reference, as many as there is time for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from jacfunc._measuring import WrongAnswerError
from jacfunc._trees import flatten
from jacfunc._types import Leaves, Tree, is_tensor
from jacfunc.compare._problem import Problem
from jacfunc.compare._reference import Plain

PATIENCE, MOST_BYTES = 10.0, 2**28
"""Seconds that the loop may take, and bytes of its rows; those that it does not reach are left."""

TF32 = 2.0**-10
"""The precision of float32 products where CUDA is allowed to shorten them."""


@dataclass(frozen=True)
class Judge:
    """Rows to compare answers with.

    Args:
        index: for each output leaf, which rows these are among those of all samples.
        rows: for each output leaf, and each target, the gradients.
        scales: the largest entry of each of these.
        leads: for each output leaf ``[samples, *out]``.
        shapes: of the targets.
        precision: relative, of what answers are computed in.
        says: how many rows there are, and how they were found.
    """

    index: tuple[Tensor, ...]
    rows: tuple[Leaves, ...]
    scales: tuple[tuple[float, ...], ...]
    leads: tuple[tuple[int, ...], ...]
    shapes: tuple[torch.Size, ...]
    is_sampled: bool
    precision: float
    says: str

    @classmethod
    def of(cls, plain: Plain, precision: float, patience: float = PATIENCE) -> Judge:
        """From as many rows as there is time for."""
        with plain.at_hand():
            first = plain.sample(0)
            kept: list[list[tuple[int, Leaves]]] = [[] for _ in first.outputs]
            start, held = time.perf_counter(), 0
            for leaf, row, gradients in plain.rows():
                kept[leaf].append((row, gradients))
                held += sum(gradient.nbytes for gradient in gradients)
                if held > MOST_BYTES or time.perf_counter() - start > patience:
                    break
        rows = tuple(_stacked([gradients for _, gradients in found]) for found in kept)
        return cls(
            tuple(torch.tensor([row for row, _ in found], dtype=torch.long) for found in kept),
            rows,
            tuple(tuple(_largest(block) for block in blocks) or (0.0,) for blocks in rows),
            tuple((plain.size, *out.shape) for out in first.outputs),
            first.shapes,
            plain.problem.is_sampled,
            precision,
            _in_words(plain, sum(map(len, kept)), plain.size * _numel(first.outputs)),
        )

    def __call__(self, answer: Tree) -> float:
        """The largest error, relative to the largest entry of its block.

        Raises:
            WrongAnswerError: it is too large, or there are other blocks than were expected.
        """
        blocks = [leaf for leaf in flatten(answer)[0] if is_tensor(leaf)]
        wanted = list(product(range(len(self.leads)), range(len(self.shapes))))
        if len(blocks) != len(wanted):
            raise WrongAnswerError(f"{len(blocks)} blocks instead of {len(wanted)}")
        errors = [self._error(block, i, j) for block, (i, j) in zip(blocks, wanted, strict=True)]
        worst = max(errors, default=0.0)
        # a NaN fails the comparison too
        if not all(error <= self.precision**0.5 for error in errors):
            raise WrongAnswerError(f"relative error {worst:.1e}")
        return worst

    def _error(self, block: Tensor, i: int, j: int) -> float:
        lead, expected = self.leads[i], self.rows[i][j] if self.rows[i] else None
        block = block.detach() if self.is_sampled else block.detach()[None]
        if block.shape != (*lead, *self.shapes[j]):
            wanted = (*lead, *self.shapes[j])[0 if self.is_sampled else 1 :]
            shape = block.shape[0 if self.is_sampled else 1 :]
            raise WrongAnswerError(f"a block {tuple(shape)} instead of {wanted}")
        if expected is None or not expected.numel():
            return 0.0
        place = torch.unravel_index(self.index[i].to(block.device), lead)
        found = block[place].to(expected.device, expected.dtype)
        apart = float(found.sub_(expected).abs_().max())
        # where a block is zero but for rounding, its rounding is that of what it was summed from
        scale = max(self.scales[i][j], self.precision**0.5 * max(map(max, self.scales)))
        if not apart:
            return 0.0
        return apart / scale if scale else math.inf


def precision_of(problem: Problem) -> float:
    """The relative precision of the coarsest dtype among the tensors of a problem."""
    coarsest = max(torch.finfo(dtype).eps for dtype in problem.dtypes)
    shortened = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return max(coarsest, TF32) if problem.device.type == "cuda" and shortened else coarsest


def _stacked(rows: list[Leaves]) -> Leaves:
    return tuple(map(torch.stack, zip(*rows, strict=True)))


def _largest(block: Tensor) -> float:
    return float(block.abs().max()) if block.numel() else 0.0


def _numel(leaves: Leaves) -> int:
    return sum(leaf.numel() for leaf in leaves)


def _in_words(plain: Plain, kept: int, total: int) -> str:
    rows = f"all {total:,} rows" if kept == total else f"{kept:,} of {total:,} rows"
    there = "float64 on the CPU" if plain.is_exact else "the dtype and on the device given"
    return f"{rows} compared with a loop of torch.autograd.grad in {there}"
