"""Rules for linear layers and products of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from jacfunc.layers._contraction import Operand, contraction, unused
from jacfunc.layers._forms import Form, Outer, Rows
from jacfunc.layers._rules import FormOf, opening, rule


@rule(F.linear, keeps_lead=True)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Mapping[str, FormOf]:
    """``z[…, o] = Σᵢ input[…, i] weight[o, i] + bias[o]``."""
    shape = weight.shape[1:]

    def of_weight(seeds: Tensor) -> Form:
        seeds = seeds.unsqueeze(-1) if len(shape) == 1 else seeds
        return Outer(positions(input, 1), positions(seeds, 2), shape)

    if bias is None:
        return {"weight": of_weight}
    return {"weight": of_weight, "bias": partial(Rows.like, bias)}


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def product(input: Tensor, other: Tensor) -> Mapping[str, FormOf]:
    """``z[…, n, o] = Σᵢ input[…, n, i] other[…, i, o]``, without n or o where one is a vector."""
    left, right = input.dim() - 1, other.dim() - 1
    if not left or not right:
        return {}
    lead = unused("nio", max(left, right, 2) - 2)
    letters = lead[len(lead) + 2 - left :] + "ni" if left > 1 else "i"
    others = lead[len(lead) + 2 - right :] + "io" if right > 1 else "i"
    out = lead + "n" * (left > 1) + "o" * (right > 1)
    return contraction({"input": Operand(input, letters), "other": Operand(other, others)}, out)


@rule(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def matrices(input: Tensor, mat2: Tensor) -> Mapping[str, FormOf]:
    """``z[…, n, o] = Σᵢ input[…, n, i] mat2[…, i, o]``, of two matrices or two stacks of them."""
    return _renamed(product(input, mat2), input="input", mat2="other")


@rule(torch.mv, Tensor.mv)
def vector(input: Tensor, vec: Tensor) -> Mapping[str, FormOf]:
    """``z[n] = Σᵢ input[n, i] vec[i]``."""
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
    """``z = β input + α batch1 batch2``, of stacks of matrices."""
    return _added(input, {"batch1": batch1, "batch2": batch2}, beta, alpha)


@opening(torch.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, applied to all products of the two inputs."""
    products = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    return F.linear(products.flatten(-2), weight.flatten(1), bias)


def positions(tensor: Tensor, lead: int) -> Tensor:
    """``[*lead, 1, T, n]``: a tensor ``[*lead, …, n]`` with one group, at T positions.

    Args:
        tensor: inputs of a layer, or cotangents of its output.
        lead: how many dimensions are in front: those of samples, and of cotangents.

    Example:
        >>> import torch
        >>> from jacfunc.layers import positions
        >>> positions(torch.ones(8, 5, 7, 3), 1).shape
        torch.Size([8, 1, 35, 3])
    """
    if tensor.dim() == lead + 2:
        return tensor.unsqueeze(lead)
    return tensor.reshape(*tensor.shape[:lead], 1, -1, tensor.shape[-1])


def _renamed(forms: Mapping[str, FormOf], **names: str) -> dict[str, FormOf]:
    """Forms under new names: each keyword is the new name of the form under its value."""
    return {new: forms[old] for new, old in names.items() if old in forms}


def _added(
    input: Tensor, factors: Mapping[str, Tensor], beta: float, alpha: float
) -> dict[str, FormOf]:
    """The forms of the two factors of a scaled product, and of what is added to it."""
    if not all(isinstance(x, Tensor) for x in (input, *factors.values())):
        return {}  # an old order of the arguments, with the scales among them
    left, right = factors
    forms = _renamed(product(*factors.values()), **{left: "input", right: "other"})
    scaled = {name: _times(form_of, alpha) for name, form_of in forms.items()}
    return {**scaled, "input": _times(partial(Rows.like, input), beta)}


def _times(form_of: FormOf, scale: float) -> FormOf:
    """The form of a parameter in an output that is scaled."""
    return lambda seeds: form_of(seeds if scale == 1 else seeds * scale)
