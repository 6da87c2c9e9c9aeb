"""Products of a factored Jacobian with a random matrix, which is never whole in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

from jacfunc._factored import Part, rows
from jacfunc._memory import DRAWN_BYTES
from jacfunc.layers import Outer


class SignMatrix:
    """The random matrix of one parameter, whose rows are drawn one after the other.

    Args:
        at_once: bytes of the matrix that exist at a time.
    """

    def __init__(self, key: str, size: int, like: Tensor, at_once: int = DRAWN_BYTES) -> None:
        self.size, self.at_once = size, at_once
        # on the CPU, so that every device gets the same matrix; a seed there has 32 bits
        self._generator = torch.Generator().manual_seed(crc32(key.encode()))
        self.dtype = like.dtype
        self._of_byte = _of_byte(size, like.dtype, like.device)

    def rows(self, count: int) -> Tensor:
        """Draw the next ``count`` rows, ``[count, size]``."""
        words = torch.empty((count, -(-self.size // 64)), dtype=torch.int64)
        words.random_(-(2**63), None, generator=self._generator)
        numbers = words.view(torch.uint8).flatten().to(self._of_byte.device, torch.int32)
        return self._of_byte.index_select(0, numbers).view(count, -1)[:, : self.size]


def projected(parts: Sequence[Part], zeros: Callable[[], Tensor], signs: SignMatrix) -> Tensor:
    """The rows of a Jacobian times the matrix, ``[B, K, size]``, by the cheaper of two ways."""
    form = parts[0].form
    if len(parts) == 1 and isinstance(form, Outer) and not parts[0].path and not form.is_transposed:
        num_seeds, _, _, positions, outs = form.cotangents.shape
        ins = form.inputs.shape[-1]
        by_factors = positions * outs * signs.size * (ins + num_seeds)
        if by_factors <= num_seeds * outs * ins * (positions + signs.size):
            return _projected_by_factors(form, signs)
    return _projected_by_rows(rows(parts, zeros), signs)


def _projected_by_factors(form: Outer, signs: SignMatrix) -> Tensor:
    """The inputs times the matrix, and then the cotangents times that."""
    left = form.cotangents.to(signs.dtype).permute(2, 1, 0, 3, 4)
    groups, size, num_seeds, positions, outs = left.shape
    right = form.inputs.to(left.dtype).transpose(0, 1).flatten(1, 2)
    ins, total = right.shape[-1], left.new_zeros((size, num_seeds, signs.size))
    step = _at_once(signs, total, max(ins, size * positions))
    for group in range(groups):
        for start in range(0, outs, step):
            cotangents = left[group, ..., start : start + step]
            count = cotangents.shape[-1]
            table = signs.rows(count * ins).view(count, ins, -1).transpose(0, 1).flatten(1)
            through = (right[group] @ table).view(size, positions * count, -1)
            total.baddbmm_(cotangents.reshape(size, num_seeds, positions * count), through)
    return total


def _projected_by_rows(block: Tensor, signs: SignMatrix) -> Tensor:
    """Rows ``[B, K, *param]`` times the matrix."""
    flat = block.reshape(block.shape[:2].numel(), -1).to(signs.dtype)
    total = flat.new_zeros((len(flat), signs.size))
    step = _at_once(signs, total, 1)
    for start in range(0, flat.shape[1], step):
        columns = flat[:, start : start + step]
        total.addmm_(columns, signs.rows(columns.shape[1]))
    return total.view(*block.shape[:2], -1)


def _at_once(signs: SignMatrix, like: Tensor, width: int) -> int:
    """How many outputs to take at once, each of which needs ``width`` rows of the matrix."""
    return max(1, signs.at_once // (signs.size * width * like.element_size()))


@lru_cache(maxsize=8)
def _of_byte(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs ``±1/√size`` that each byte stands for, ``[256, 8]``."""
    with torch.inference_mode(False):
        bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
        return (2 * bits - 1).to(device, dtype) / math.sqrt(size)
