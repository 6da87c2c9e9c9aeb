"""Linear layers and products with a matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc.layers._contraction import Operand, contraction, unused
from jacfunc.layers._forms import Form, Outer, Rows, summed
from jacfunc.layers._rules import FormOf, opening, rule


@rule(F.linear, keeps_lead=True)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Mapping[str, FormOf]:
    """``z[…, o] = Σᵢ input[…, i] weight[o, i] + bias[o]``."""
    shape = weight.shape[1:]

    def of_weight(seeds: Tensor) -> Form:
        seeds = seeds.unsqueeze(-1) if len(shape) == 1 else seeds
        return Outer(positions(input, 1), positions(seeds, 2), shape)

    return {"weight": of_weight} if bias is None else {"weight": of_weight, "bias": _shift(bias)}


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def product(input: Tensor, other: Tensor) -> Mapping[str, FormOf]:
    """``z[…, n, o] = Σᵢ input[…, n, i] other[…, i, o]``, without n or o where one is a vector."""
    left, right = input.dim() - 1, other.dim() - 1
    if not left or not right:
        return {}
    lead = unused("nio", max(left, right, 2) - 2)
    mine = lead[len(lead) + 2 - left :] + "ni" if left > 1 else "i"
    theirs = lead[len(lead) + 2 - right :] + "io" if right > 1 else "i"
    out = lead + "n" * (left > 1) + "o" * (right > 1)
    return contraction({"input": Operand(input, mine), "other": Operand(other, theirs)}, out)


@rule(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def matrices(input: Tensor, mat2: Tensor) -> Mapping[str, FormOf]:
    """The same of two matrices, or of two stacks of them."""
    return _renamed(product(input, mat2), input="input", mat2="other")


@rule(torch.mv, Tensor.mv)
def vector(input: Tensor, vec: Tensor) -> Mapping[str, FormOf]:
    """The same of a matrix and a vector."""
    return _renamed(product(input, vec), input="input", vec="other")


@rule(torch.addmm, Tensor.addmm)
def added(
    input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1
) -> Mapping[str, FormOf]:
    """``z = β input + α mat1 mat2``."""
    return _added(input, {"mat1": mat1, "mat2": mat2}, beta, alpha)


@rule(torch.baddbmm, Tensor.baddbmm)
def added_stacks(
    input: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1
) -> Mapping[str, FormOf]:
    """The same of stacks of matrices."""
    return _added(input, {"batch1": batch1, "batch2": batch2}, beta, alpha)


@opening(torch.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of all products of the two inputs."""
    products = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    return F.linear(products.flatten(-2), weight.flatten(1), bias)


def positions(tensor: Tensor, lead: int) -> Tensor:
    """``[*lead, …, n]`` as ``[*lead, 1, T, n]``."""
    return tensor.reshape(*tensor.shape[:lead], 1, -1, tensor.shape[-1])


def _shift(bias: Tensor, scale: float = 1) -> FormOf:
    return lambda seeds: Rows(summed(seeds if scale == 1 else seeds * scale, bias.shape[1:]))


def _renamed(forms: Mapping[str, FormOf], **names: str) -> dict[str, FormOf]:
    """By the names that another function has for its arguments."""
    return {mine: forms[theirs] for mine, theirs in names.items() if theirs in forms}


def _added(
    input: Tensor, factors: Mapping[str, Tensor], beta: float, alpha: float
) -> dict[str, FormOf]:
    """A scaled product, and what is added to it."""
    if not all(isinstance(x, Tensor) for x in (input, *factors.values())):
        return {}  # an old order of the arguments, with the scales among them
    left, right = factors
    forms = _renamed(product(*factors.values()), **{left: "input", right: "other"})
    scaled = {name: _times(form_of, alpha) for name, form_of in forms.items()}
    return {**scaled, "input": _shift(input, beta)}


def _times(form_of: FormOf, scale: float) -> FormOf:
    return lambda seeds: form_of(seeds if scale == 1 else seeds * scale)
