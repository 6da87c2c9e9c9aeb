"""Every door for the samples of a module, each beside what a loop over samples says it returns.

The loop is one of ``torch.autograd.grad`` over the entries of one sample's outputs, where the
module is given a batch of one. All that comes back is brought to one form: output leaves in a row,
parameters and inputs flat.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import jacfunc
from tests.truth.oracles import float_leaves, is_real_tensor, leaves_of

Inputs = tuple[Tensor, ...]
Call = Callable[[Inputs], Tensor]


class Truth(NamedTuple):
    """Of every sample alone, all output leaves in a row: outputs, and Jacobians."""

    outputs: Tensor  # [B, M]
    params: Tensor  # [B, M, P]
    inputs: Tensor  # [B, M, N]
    sizes: list[int]  # of the output leaves

    @property
    def gradients(self) -> Tensor:
        """Of half the squared outputs, in the parameters."""
        return torch.einsum("bmp,bm->bp", self.params, self.outputs)


def rows_of(out: Tensor, leaves: list[Tensor]) -> Tensor:
    """``[M, sum of leaves]``, a backward pass an entry."""
    if not leaves:
        return out.new_zeros(len(out), 0)
    rows = []
    for entry in out:
        grads = torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def trained(module: nn.Module) -> list[Tensor]:
    return [param for param in module.parameters() if param.requires_grad]


def alone(module: nn.Module, inputs: Inputs) -> Truth:
    """One sample, as a batch of one."""
    point = [x.clone().requires_grad_() if is_real_tensor(x) else x for x in inputs]
    leaves = float_leaves(module(*point))
    out = torch.cat([leaf.flatten() for leaf in leaves])
    by_both = [rows_of(out, of) for of in (trained(module), float_leaves(point))]
    return Truth(out.detach(), *by_both, [leaf.numel() for leaf in leaves])


def truth_of(module: nn.Module, inputs: Inputs) -> Truth:
    """Each sample alone."""
    samples = range(len(inputs[0]))
    outputs, params, by_inputs, sizes = zip(
        *(alone(module, tuple(x[b : b + 1] for x in inputs)) for b in samples), strict=True
    )
    return Truth(torch.stack(outputs), torch.stack(params), torch.stack(by_inputs), sizes[0])


class Door(NamedTuple):
    """A door that is opened once for a module, and called with batches.

    ``expected`` gives what it returns for a batch whose truth is known.
    """

    open: Callable[[nn.Module], Call]
    expected: Callable[[Truth, nn.Module], Tensor]


# --- Jacobians ---


def matrix(jacobian: Any, widths: list[int]) -> Tensor:
    """``[B, M, N]`` of blocks ``[B, *out, *in]``: for each output leaf one of every width."""
    blocks = float_leaves(jacobian)
    flat = [
        block.reshape(len(block), -1, width)
        for block, width in zip(blocks, widths * (len(blocks) // len(widths)), strict=True)
    ]
    rows = [flat[n : n + len(widths)] for n in range(0, len(flat), len(widths))]
    return torch.cat([torch.cat(row, 2) for row in rows], 1)


def widths_of(wrt: tuple[str, ...], module: nn.Module, inputs: Inputs) -> list[int]:
    of = {
        "params": [param.numel() for param in trained(module)],
        "inputs": [x[0].numel() for x in float_leaves(inputs)],
    }
    return [width for what in wrt for width in of[what]]


def whole(wrt: tuple[Any, ...], strategy: str, module: nn.Module) -> Call:
    jacobian = jacfunc.module_jacobian(module, wrt, per_sample=True, strategy=strategy)
    return lambda inputs: matrix(jacobian(*inputs), widths_of(wrt, module, inputs))


def ends(module: nn.Module) -> Call:
    """The first and the last row of every sample."""
    rows = jacfunc.module_jacobian(module, per_sample=True, flat=True, outputs=[0, -1])
    return lambda inputs: rows(*inputs)


def by_params(blocks: list[Any], widths: list[int]) -> Tensor:
    pairs = zip(blocks, widths, strict=True)
    return torch.cat([matrix(block, [width]) for block, width in pairs], 2)


def by_rows(blocks: list[Any], widths: list[int]) -> Tensor:
    rows = [[x.reshape(*x.shape[:2], -1) for x in leaves_of(block)] for block in blocks]
    return torch.cat([torch.cat(row, 2) for row in rows], 1)


def by_samples(blocks: list[Any], widths: list[int]) -> Tensor:
    return torch.cat([matrix(block, widths) for block in blocks])


STREAMS: dict[Any, Callable[[list[Any], list[int]], Tensor]] = {
    "params": by_params,
    "rows": by_rows,
    "samples": by_samples,
}


def streamed(by: Any, module: nn.Module) -> Call:
    stream = jacfunc.stream_jacobian(module, by, per_sample=True, chunk_size=3)
    return lambda inputs: STREAMS[by](
        [block for _, block in stream(*inputs)], widths_of(("params",), module, inputs)
    )


# --- what is made of them ---


TARGETS = torch.zeros((), dtype=torch.float64)
COLUMNS = 6  # of a projection


def half_square(outputs: Any, targets: Tensor) -> Tensor:
    """Of all output leaves, whose second derivative is the identity."""
    return sum((0.5 * (out - targets).square().sum() for out in float_leaves(outputs)), targets)


def kernels(module: nn.Module) -> Call:
    """Those of all output leaves, in a row."""
    return lambda inputs: torch.cat(
        [kernel.flatten() for kernel in leaves_of(jacfunc.ntk(module, None, inputs))]
    )


def true_kernels(true: Truth, module: nn.Module) -> Tensor:
    leaves = true.params.split(true.sizes, 1)
    return torch.cat([torch.einsum("aip,bjp->abij", x, x).flatten() for x in leaves])


def flat(by_name: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in by_name.values()])


def gauss_newton(ask: Callable[[Any, nn.Module], Any], module: nn.Module) -> Call:
    at = jacfunc.ggn(module, half_square)
    return lambda inputs: flat(ask(at(*inputs, TARGETS), module))


def times_ones(G: Any, module: nn.Module) -> Any:
    named = module.named_parameters()
    return G @ {name: torch.ones_like(param) for name, param in named if param.requires_grad}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def fisher(module: nn.Module) -> Call:
    def call(inputs: Inputs) -> Tensor:
        draw = jacfunc.fisher(module, "gaussian", reduction="sum", generator=generator())
        return flat(draw(*inputs).diagonal())

    return call


def true_fisher(true: Truth, module: nn.Module) -> Tensor:
    """From the same draws, which are made leaf by leaf."""
    source, total = generator(), torch.zeros_like(true.params[:, 0])
    for rows in true.params.split(true.sizes, 1):
        noise = torch.randn(rows.shape[:2], generator=source, dtype=rows.dtype)
        total += torch.einsum("bmp,bm->bp", rows, noise)
    return total.square().sum(0)


def norms(module: nn.Module) -> Call:
    of = jacfunc.gradient_norms(module, half_square)
    return lambda inputs: of(*inputs, TARGETS)


def projection(module: nn.Module) -> Call:
    project = jacfunc.random_projection(module, COLUMNS)
    return lambda inputs: torch.cat(
        [leaf.reshape(len(leaf), -1, COLUMNS) for leaf in leaves_of(project(*inputs))], 1
    )


class Row(nn.Module):
    """All parameters in a row, whatever comes in: its Jacobian is the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([param.flatten() for param in trained(self)]).expand(len(x), -1)


def true_projection(true: Truth, module: nn.Module) -> Tensor:
    """By the signs that parameters of these names are projected by."""
    row = copy.deepcopy(module)
    row.__class__ = Row
    (signs,) = jacfunc.random_projection(row, COLUMNS)(torch.zeros(1))
    torch.testing.assert_close(signs.abs(), torch.full_like(signs, 1 / math.sqrt(COLUMNS)))
    return true.params @ signs


def operator(module: nn.Module) -> Call:
    """``Jᵀ f``, and J times that."""
    operator_of = jacfunc.module_operator(module, per_sample=True)

    def products(inputs: Inputs) -> Tensor:
        J = operator_of(*inputs)
        gradient = J.rmv(J.outputs)
        pushed = [out.reshape(len(out), -1) for out in float_leaves(J @ gradient)]
        return torch.cat([flat(gradient), torch.cat(pushed, 1).flatten()])

    return products


def true_products(true: Truth, module: nn.Module) -> Tensor:
    gradient = true.gradients.sum(0)
    return torch.cat([gradient, torch.einsum("bmp,p->bm", true.params, gradient).flatten()])


WRT: dict[str, tuple[str, ...]] = {
    "params": ("params",),
    "inputs": ("inputs",),
    "both": ("params", "inputs"),
}


def true_matrix(wrt: tuple[str, ...], true: Truth, module: nn.Module) -> Tensor:
    return torch.cat([getattr(true, what) for what in wrt], 2)


DOORS = {
    f"{name}, {strategy}": Door(partial(whole, wrt, strategy), partial(true_matrix, wrt))
    for name, wrt in WRT.items()
    for strategy in ("auto", "reverse", "looped", "structured")
}
DOORS["rows"] = Door(ends, lambda true, _: true.params[:, [0, -1]])
DOORS |= {
    f"stream by {by}": Door(partial(streamed, by), lambda true, _: true.params) for by in STREAMS
}
DOORS |= {
    "ntk": Door(kernels, true_kernels),
    "ggn product": Door(
        partial(gauss_newton, times_ones),
        lambda true, _: torch.einsum("bmp,bmq->p", true.params, true.params),
    ),
    "ggn diagonal": Door(
        partial(gauss_newton, lambda G, _: G.diagonal()),
        lambda true, _: true.params.square().sum((0, 1)),
    ),
    "fisher": Door(fisher, true_fisher),
    "gradient norms": Door(norms, lambda true, _: true.gradients.norm(dim=1)),
    "projection": Door(projection, true_projection),
    "operator": Door(operator, true_products),
}
