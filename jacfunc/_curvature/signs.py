"""Products of a factored Jacobian with a random matrix, which is never whole in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Self, TypeAlias
from zlib import crc32

import torch
from torch import Tensor

from jacfunc._arguments import whole
from jacfunc._factored import Part, rows
from jacfunc._memory import DRAWN_BYTES
from jacfunc._torch import fixed
from jacfunc._types import Leaves
from jacfunc.layers import Gather, Outer

Named: TypeAlias = Mapping[str, Tensor]
PartsByName: TypeAlias = Mapping[str, Sequence[Part]]


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
        self._of_byte = fixed(partial(_of_byte, size, like.dtype, like.device))

    def rows(self, count: int) -> Tensor:
        """Draw the next ``count`` rows, ``[count, size]``."""
        words = fixed(partial(self._words, (count, -(-self.size // 64))))
        numbers = words.view(torch.uint8).flatten().to(self._of_byte.device, torch.int32)
        return self._of_byte.index_select(0, numbers).view(count, -1)[:, : self.size]

    def _words(self, shape: tuple[int, int]) -> Tensor:
        words = torch.empty(shape, dtype=torch.int64)
        return words.random_(-(2**63), None, generator=self._generator)


def signs_of(api: str, size: Any, per_module: Any, seed: Any) -> FlatSigns | SignsBySide:
    """The random signs that the options of a door ask for; TypeError or ValueError if none."""
    whole(api, "seed", seed, "The same seed gives the same matrix.")
    if per_module is None:
        if not _is_size(size):
            raise ValueError(
                f"{api}: size must be a positive number of columns, got {size!r}. "
                "Some hundreds are usual."
            )
        return FlatSigns(seed, size)
    if size is not None:
        raise ValueError(
            f"{api}: size must be None with per_module, got {size!r}. Pass one of the two."
        )
    sizes = per_module if isinstance(per_module, tuple | list) else ()
    if len(sizes) != 2 or not all(map(_is_size, sizes)):
        raise ValueError(
            f"{api}: per_module must be two positive numbers of columns, got {per_module!r}. "
            "(48, 48) is usual."
        )
    return SignsBySide(seed, *sizes)


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1


@dataclass(frozen=True)
class FlatSigns:
    """One matrix for all parameters, with rows for each of their entries."""

    seed: int
    size: int

    def projected(
        self, parts_by_name: PartsByName, params: Named, zeros: Tensor, at_once: int
    ) -> Leaves:
        """The products ``[B, K, size]`` of a Jacobian, added to zeros of this shape."""
        for name, parts in parts_by_name.items():
            block = partial(zeros.new_zeros, (*zeros.shape[:2], *params[name].shape))
            signs = SignMatrix(_key(self.seed, name), self.size, zeros, at_once)
            zeros += projected(parts, block, signs)
        return (zeros,)


@dataclass(frozen=True)
class SignsBySide:
    """For each parameter a matrix of its own, which is a product of one for each of its sides."""

    seed: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """The columns of each parameter's matrix."""
        return self.rows * self.columns

    def projected(
        self, parts_by_name: PartsByName, params: Named, zeros: Tensor, at_once: int
    ) -> Leaves:
        """The products ``[B, K, size]`` of each parameter's Jacobian; zeros if it is not used."""
        products = []
        for name, param in params.items():
            parts, key = parts_by_name.get(name), _key(self.seed, name)
            block = partial(zeros.new_zeros, (*zeros.shape[:2], *param.shape))
            if not parts:
                products.append(torch.zeros_like(zeros))
            elif param.dim() < 2:
                signs = SignMatrix(key, self.size, zeros, at_once)
                products.append(projected(parts, block, signs))
            else:
                sides = TwoSidedSigns.drawn(key, param.shape, (self.rows, self.columns), zeros)
                products.append(sides.projected(parts, block))
        return tuple(products)


def _key(seed: int, name: str) -> str:
    """What fixes the signs of a parameter; a compiled module gives its parameters longer names."""
    return f"{seed}:{name.replace('_orig_mod.', '')}"


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
            del table, through  # or they would stay beside the next ones
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


@dataclass(frozen=True)
class TwoSidedSigns:
    """``rows ⊗ columns``: the random matrix of one parameter ``[n, m]``, from one for each side.

    Args:
        rows: signs for the rows of the parameter, ``[n, r]``.
        columns: signs for its columns, which are all dimensions but the first, ``[m, c]``.
        shape: the shape of the parameter.
    """

    rows: Tensor
    columns: Tensor
    shape: torch.Size

    @classmethod
    def drawn(cls, key: str, shape: torch.Size, sizes: tuple[int, int], like: Tensor) -> Self:
        """The signs for a parameter of two dimensions at least."""
        of_rows = SignMatrix(f"{key}:rows", sizes[0], like)
        of_columns = SignMatrix(f"{key}:columns", sizes[1], like)
        return cls(of_rows.rows(shape[0]), of_columns.rows(shape[1:].numel()), shape)

    def projected(self, parts: Sequence[Part], zeros: Callable[[], Tensor]) -> Tensor:
        """The rows of a Jacobian times the matrix, ``[B, K, r · c]``: the sum over its parts."""
        first, *others = [self._of_part(part, zeros) for part in parts]
        for other in others:
            first = first + other
        return first.flatten(2)

    def _of_part(self, part: Part, zeros: Callable[[], Tensor]) -> Tensor:
        """``[B, K, r, c]``: each factor times the signs of its side, and then their product."""
        form, dtype = part.form, self.rows.dtype
        if isinstance(form, Gather) and not part.path:
            seeds = (form.cotangents.to(dtype) @ self.columns).unsqueeze(2)
            return _multiplied(seeds, self.rows[form.index].unsqueeze(1)).mT
        sides = part.sides(self.shape)
        if isinstance(form, Outer) and sides is not None:
            outs, ins, are_outs_rows = sides
            left, right = (self.rows, self.columns) if are_outs_rows else (self.columns, self.rows)
            seeds = torch.einsum("kbgto,gop->kbgtp", form.cotangents.to(dtype), left[outs])
            inputs = torch.einsum("bgti,giq->bgtq", form.inputs.to(dtype), right[ins])
            products = _multiplied(seeds, inputs)
            return products if are_outs_rows else products.mT
        block = rows([part], zeros).to(dtype).flatten(3)
        return ((block @ self.columns).mT @ self.rows).mT


def _multiplied(seeds: Tensor, inputs: Tensor) -> Tensor:
    """``[B, K, p, q]``: the sum over groups and positions of ``[K, B, g, T, p] · [B, g, T, q]``."""
    num_seeds, size, groups, positions, width = seeds.shape
    left = seeds.permute(1, 0, 4, 2, 3).reshape(size, num_seeds * width, groups * positions)
    product = left @ inputs.flatten(1, 2)
    return product.view(size, num_seeds, width, inputs.shape[-1])


def _at_once(signs: SignMatrix, like: Tensor, width: int) -> int:
    """How many outputs to take at once, each of which needs ``width`` rows of the matrix."""
    return max(1, signs.at_once // (signs.size * width * like.element_size()))


@lru_cache(maxsize=8)
def _of_byte(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs ``±1/√size`` that each byte stands for, ``[256, 8]``."""
    with torch.inference_mode(False):
        bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
        return (2 * bits - 1).to(device, dtype) / math.sqrt(size)
