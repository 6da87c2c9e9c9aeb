"""Forms of the operands of sums of products, which are written in letters as in ``einsum``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from jacfunc.layers._forms import Form, Outer, Rows
from jacfunc.layers._rules import FormOf, rule


@dataclass(frozen=True)
class Operand:
    """A tensor ``[B, *shape]``, with a letter for each dimension behind the samples."""

    tensor: Tensor
    letters: str

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter's dimension."""
        return dict(zip(self.letters, self.tensor.shape[1:], strict=True))

    def squeezed(self, sizes: Mapping[str, int]) -> Operand:
        """The operand without the dimensions that are broadcast to these sizes."""
        dims = [n for n, letter in enumerate(self.letters) if self.sizes[letter] < sizes[letter]]
        letters = "".join(letter for n, letter in enumerate(self.letters) if n not in dims)
        return Operand(self.tensor.squeeze([n + 1 for n in dims]), letters)


def contraction(operands: Mapping[str, Operand], out: str) -> dict[str, FormOf]:
    """A form for each operand in the product of all, summed to ``out``, that has one."""
    terms = (*(operand.letters for operand in operands.values()), out)
    if any(len(set(letters)) < len(letters) for letters in terms):
        return {}
    forms: dict[str, FormOf] = {}
    for name, operand in operands.items():
        others = [other for key, other in operands.items() if key != name]
        use = Contraction.of(operand, others, out)
        if use is not None:
            forms[name] = use.form
    return forms


@dataclass(frozen=True)
class Contraction:
    """``z[out] = Σ param[letters] · Π others``, seen from the operand that is a parameter.

    Args:
        others: the other operands, without dimensions that they are broadcast along.
        letters: the letters of the parameter's dimensions, but for those of size one.
        out: the letters of the result.
        sizes: the size of each letter.
        shape: the shape of the parameter.
    """

    others: Sequence[Operand]
    letters: str
    out: str
    sizes: Mapping[str, int]
    shape: torch.Size

    @classmethod
    def of(cls, param: Operand, others: Sequence[Operand], out: str) -> Contraction | None:
        """The contraction; None if a dimension is the parameter's alone, or numbers are cast."""
        if any(other.tensor.is_complex() != param.tensor.is_complex() for other in others):
            return None
        sizes = dict(param.sizes)
        for other in others:
            sizes.update({k: n for k, n in other.sizes.items() if sizes.get(k, 1) == 1})
        others = [other.squeezed(sizes) for other in others]
        letters = "".join(letter for letter, size in param.sizes.items() if size != 1)
        elsewhere = {*out, *(letter for other in others for letter in other.letters)}
        if not elsewhere.issuperset(letters):
            return None
        return cls(others, letters, out, sizes, param.tensor.shape[1:])

    def form(self, seeds: Tensor) -> Form:
        """The form of the parameter, from cotangents ``[K, B, *z]``."""
        in_others = {letter for other in self.others for letter in other.letters}
        groups = "".join(k for k in self.letters if k in in_others and k in self.out)
        outs = "".join(k for k in self.letters if k not in in_others)
        ins = "".join(k for k in self.letters if k not in self.out)
        orders = (groups + outs + ins, groups + ins + outs)
        if self.letters not in orders or not outs + ins:
            return Rows(self._products(seeds))
        places = "".join(k for k in self.out if k not in self.letters)
        return Outer(
            self._inputs(groups, places, ins),
            self._arranged(seeds, groups, places, outs),
            self.shape,
            is_transposed=self.letters != orders[0],
        )

    def _products(self, seeds: Tensor) -> Tensor:
        """Rows of the Jacobian, ``[K, B, *param]``."""
        products = self._einsum(self.others, self.letters, seeds)
        return products.reshape(*seeds.shape[:2], *self.shape)

    def _inputs(self, groups: str, places: str, ins: str) -> Tensor:
        """The other operands multiplied, as the inputs ``[B, g, T, I]`` of a form."""
        in_others = {letter for other in self.others for letter in other.letters}
        out = "".join(k for k in groups + places + ins if k in in_others)  # others have size one
        products = self._einsum(self.others, out, None)
        return products.reshape(len(products), *map(self._size, (groups, places, ins)))

    def _arranged(self, seeds: Tensor, groups: str, places: str, outs: str) -> Tensor:
        """The cotangents as those of a form, ``[K, B, g, T, O]``."""
        order = [self.out.index(letter) + 2 for letter in groups + places + outs]
        sizes = map(self._size, (groups, places, outs))
        return seeds.permute(0, 1, *order).reshape(*seeds.shape[:2], *sizes)

    def _einsum(self, operands: Sequence[Operand], out: str, seeds: Tensor | None) -> Tensor:
        """The product of operands, and of seeds if there are some, summed to ``[K, B, *out]``."""
        seed, sample = list(unused("".join(self.sizes) + self.out, 2))
        terms = [sample + operand.letters for operand in operands]
        tensors = [operand.tensor for operand in operands]
        if seeds is None:
            return torch.einsum(f"{','.join(terms)}->{sample}{out}", *tensors)
        tensors = [seeds, *(tensor.to(seeds.dtype) for tensor in tensors)]
        return torch.einsum(
            f"{','.join([seed + sample + self.out, *terms])}->{seed}{sample}{out}", *tensors
        )

    def _size(self, letters: str) -> int:
        return prod(self.sizes[letter] for letter in letters)


def unused(letters: str, count: int) -> str:
    """Letters that are not among these; ``count`` of them."""
    return "".join(k for k in ascii_letters if k not in letters)[:count]


@rule(torch.einsum)
def einsum(
    equation: str, first: Tensor, second: Tensor | None = None, third: Tensor | None = None
) -> Mapping[str, FormOf]:
    """``torch.einsum`` of two or three operands."""
    named = {"first": first, "second": second, "third": third}
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    if len(tensors) < 2 or not isinstance(equation, str):
        return {}
    terms, out = _spelled(equation.replace(" ", ""), [x.dim() - 1 for x in tensors.values()])
    if [len(term) for term in terms] != [x.dim() - 1 for x in tensors.values()]:
        return {}
    return contraction(
        {name: Operand(x, term) for (name, x), term in zip(tensors.items(), terms, strict=True)},
        out,
    )


@rule(torch.tensordot)
def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Any = None) -> Mapping[str, FormOf]:
    """``torch.tensordot``, over a number of dimensions, or over lists of them."""
    num_left, num_right = a.dim() - 1, b.dim() - 1
    if isinstance(dims, int):
        dims = list(range(-dims, 0)), list(range(dims))
    if out is not None or not isinstance(dims, tuple | list):
        return {}
    left = unused("", num_left)
    right = list(unused(left, num_right))
    for dim, other_dim in zip(*dims, strict=True):
        right[other_dim] = left[dim]
    kept = [k for k in left if k not in right] + [k for k in right if k not in left]
    return contraction({"a": Operand(a, left), "b": Operand(b, "".join(right))}, "".join(kept))


def _spelled(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, without ellipses.

    An ellipsis is replaced by unused letters. Those of all operands end with the same letter.
    """
    inputs, arrow, out = equation.partition("->")
    if not arrow:
        once = sorted(k for k in set(inputs) - set(",.") if inputs.count(k) == 1)
        out = "".join(["...", *once])
    terms = inputs.split(",")
    widths = [d - len(term.replace("...", "")) for term, d in zip(terms, dims, strict=False)]
    width = max([0, *(w for w, term in zip(widths, terms, strict=False) if "..." in term)])
    more = unused(equation, width)
    spelled = [
        term.replace("...", more[width - w :]) for w, term in zip(widths, terms, strict=False)
    ]
    return spelled, out.replace("...", more)
