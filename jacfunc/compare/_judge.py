"""The judge compares answers with rows of the reference, as many as there is time for."""

from __future__ import annotations

import math
import time
from itertools import product

import torch
from torch import Tensor

from jacfunc._measuring import WrongAnswerError
from jacfunc._trees import flatten
from jacfunc._types import Leaves, Tree, is_tensor
from jacfunc.compare._problem import Problem
from jacfunc.compare._reference import Reference

PATIENCE, MOST_BYTES = 10.0, 2**28
"""Most seconds and bytes for the rows of the reference; rows beyond that are left out."""

TF32 = 2.0**-10
"""The relative precision of float32 products where CUDA is allowed to shorten them."""


class Judge:
    """Compares answers with rows of the reference.

    Args:
        precision: relative, of the dtype that answers are computed in.
        patience: seconds for the rows.
    """

    def __init__(self, reference: Reference, precision: float, patience: float = PATIENCE) -> None:
        self._precision, self._is_sampled = precision, reference.problem.is_sampled
        with reference.ready():
            sample = reference.sample(0)
            numbers: list[list[int]] = [[] for _ in sample.outputs]
            gradients: list[list[Leaves]] = [[] for _ in sample.outputs]
            start, size = time.perf_counter(), 0
            for leaf, number, row in reference.rows():
                numbers[leaf].append(number)
                gradients[leaf].append(row)
                size += sum(gradient.nbytes for gradient in row)
                if size > MOST_BYTES or time.perf_counter() - start > patience:
                    break
        # by output leaf: the numbers of its rows, their gradients by target, and [samples, *out]
        self._numbers = [torch.tensor(rows, dtype=torch.long) for rows in numbers]
        self._rows = [tuple(map(torch.stack, zip(*rows, strict=True))) for rows in gradients]
        self._leads = [(reference.size, *out.shape) for out in sample.outputs]
        self._shapes = sample.shapes
        self._largest = max(
            (_largest(block) for blocks in self._rows for block in blocks), default=0
        )
        kept, total = sum(map(len, numbers)), sum(map(math.prod, self._leads))
        rows = f"all {total:,} rows" if kept == total else f"{kept:,} of {total:,} rows"
        dtype = "float64 on the CPU" if reference.is_exact else "the dtype and on the device given"
        self.says = f"{rows} compared with a loop of torch.autograd.grad in {dtype}"

    def __call__(self, answer: Tree) -> float:
        """The largest error, relative to the largest entry of its block.

        Raises:
            WrongAnswerError: the error is too large, or blocks are missing or of other shapes.
        """
        blocks = [leaf for leaf in flatten(answer)[0] if is_tensor(leaf)]
        places = list(product(range(len(self._leads)), range(len(self._shapes))))
        if len(blocks) != len(places):
            raise WrongAnswerError(f"{len(blocks)} blocks instead of {len(places)}")
        errors = [self._error(block, i, j) for block, (i, j) in zip(blocks, places, strict=True)]
        # a NaN fails the comparison too
        if not all(error <= self._precision**0.5 for error in errors):
            raise WrongAnswerError(f"relative error {max(errors):.1e}")
        return max(errors, default=0.0)

    def _error(self, block: Tensor, i: int, j: int) -> float:
        """The relative error of the block of output leaf ``i`` and target ``j``."""
        shape, first = (*self._leads[i], *self._shapes[j]), 0 if self._is_sampled else 1
        if block.shape != shape[first:]:
            raise WrongAnswerError(f"a block {tuple(block.shape)} instead of {shape[first:]}")
        if not self._rows[i] or not block.numel():
            return 0.0
        expected = self._rows[i][j]
        entries = torch.unravel_index(self._numbers[i].to(block.device), self._leads[i])
        rows = block.detach().reshape(shape)[entries]
        apart = float(rows.to(expected.device, expected.dtype).sub_(expected).abs_().max())
        # a block that should be zero has the rounding of the larger numbers that it was summed from
        scale = max(_largest(expected), self._precision**0.5 * self._largest)
        if not apart:
            return 0.0
        return apart / scale if scale else math.inf


def precision_of(problem: Problem) -> float:
    """The relative precision of the coarsest dtype among the tensors of a problem."""
    coarsest = max(torch.finfo(dtype).eps for dtype in problem.dtypes)
    is_shortened = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    is_coarser = problem.device.type == "cuda" and is_shortened
    return max(coarsest, TF32) if is_coarser else coarsest


def _largest(block: Tensor) -> float:
    return float(block.abs().max()) if block.numel() else 0.0
