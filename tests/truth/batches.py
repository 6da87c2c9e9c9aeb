"""Every door of a module at a batch, against plain loops of ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import jacfunc

STRATEGIES = ("auto", "reverse", "looped", "structured")


def alone(value: Tensor) -> Tensor:
    """The input itself."""
    return value


def half(output: Any, target: Tensor) -> Tensor:
    """A loss whose gradient in the output is the output, for targets of zero."""
    return 0.5 * (output - target).square().sum()


@dataclass
class Call:
    """A module called with one input, whose samples do not depend on each other.

    Args:
        wrap: makes the argument of the module from a tensor ``[B, …]``.
        pick: takes the one tensor that is compared out of an output, or out of a result like it.
        tolerances: how near the numbers must be.
    """

    module: nn.Module
    x: Tensor
    wrap: Callable[[Tensor], Any] = alone
    pick: Callable[[Any], Any] = alone
    tolerances: Mapping[str, float] = field(default_factory=lambda: {"rtol": 1e-9, "atol": 1e-10})

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return dict(self.module.named_parameters())

    def rows(self, x: Tensor, point: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """The output, and its Jacobians ``[*out, *point]``, one backward pass a row."""
        out = self.pick(self.module(self.wrap(x)))
        grads = [
            torch.autograd.grad(o, point, retain_graph=True, materialize_grads=True)
            for o in out.reshape(-1)
        ]
        blocks = [torch.stack(of_one) for of_one in zip(*grads, strict=True)]
        pairs = zip(blocks, point, strict=True)
        return out.detach(), [block.reshape(*out.shape, *p.shape) for block, p in pairs]

    @cached_property
    def output(self) -> Tensor:
        return self.rows(self.x, tuple(self.params.values()))[0]

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        """The Jacobian in the parameters of the batch."""
        return dict(zip(self.params, self.rows(self.x, (*self.params.values(),))[1], strict=True))

    @cached_property
    def each(self) -> dict[str, Tensor]:
        """The Jacobians in the parameters of every sample alone."""
        point = tuple(self.params.values())
        rows = [self.rows(self.x[n : n + 1].clone(), point)[1] for n in range(len(self.x))]
        return dict(zip(self.params, map(torch.cat, zip(*rows, strict=True)), strict=True))

    @cached_property
    def inputs(self) -> Tensor:
        """The Jacobian in the input of every sample alone."""
        rows = []
        for n in range(len(self.x)):
            x = self.x[n : n + 1].clone().requires_grad_()
            rows.append(self.rows(x, (x,))[1][0].squeeze(self.output.dim()))
        return torch.cat(rows)

    @cached_property
    def matrix(self) -> Tensor:
        """:attr:`each` as ``[B, M, P]``."""
        count = self.output[0].numel()
        return torch.cat([v.reshape(len(self.x), count, -1) for v in self.each.values()], -1)

    def same(self, actual: Any, expected: Any) -> None:
        """Both are the same tensors by name, or the same tensor, whatever the dtype is."""
        if isinstance(expected, Tensor):
            actual, expected = {"": actual}, {"": expected}
        assert list(actual) == list(expected)
        for name, want in expected.items():
            got = actual[name].reshape(want.shape).to(want.dtype)
            torch.testing.assert_close(got, want, **self.tolerances)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """:func:`half` of the tensor that is compared."""
        return half(self.pick(output), target)

    @property
    def targets(self) -> Tensor:
        return torch.zeros_like(self.output)


def whole(call: Call, strategy: str = "auto") -> None:
    jac = jacfunc.module_jacobian(call.module, strategy=strategy)
    call.same(call.pick(jac(call.wrap(call.x))), call.whole)


def per_sample(call: Call, strategy: str) -> None:
    jac = jacfunc.module_jacobian(call.module, per_sample=True, strategy=strategy)
    call.same(call.pick(jac(call.wrap(call.x))), call.each)


def inputs(call: Call, strategy: str) -> None:
    jac = jacfunc.module_jacobian(call.module, "inputs", per_sample=True, strategy=strategy)
    (block,) = jacfunc._trees.flatten(call.pick(jac(call.wrap(call.x))))[0]
    call.same(block, call.inputs)


def full_output(call: Call) -> None:
    jac = jacfunc.module_jacobian(call.module, per_sample=True, full_output=True)
    call.same(call.pick(jac(call.wrap(call.x)).outputs), call.output)


def ntk(call: Call) -> None:
    kernel = call.pick(jacfunc.ntk(call.module, None, call.wrap(call.x)))
    call.same(kernel, torch.einsum("aip,bjp->abij", call.matrix, call.matrix))


def diagonal(call: Call) -> None:
    G = jacfunc.ggn(call.module, call.loss)(call.wrap(call.x), call.targets)
    got = torch.cat([block.reshape(-1) for block in G.diagonal().values()])
    call.same(got, call.matrix.square().sum((0, 1)))


def product(call: Call) -> None:
    G = jacfunc.ggn(call.module, call.loss)(call.wrap(call.x), call.targets)
    got = G @ {name: torch.ones_like(p) for name, p in call.params.items()}
    rows = call.matrix.flatten(0, 1)
    call.same(torch.cat([block.reshape(-1) for block in got.values()]), rows.mT @ rows.sum(1))


def gradient_norms(call: Call) -> None:
    got = jacfunc.gradient_norms(call.module, call.loss)(call.wrap(call.x), call.targets)
    gradients = torch.einsum("bip,bi->bp", call.matrix, call.output.flatten(1).to(call.matrix))
    call.same(got, gradients.norm(dim=1))


def random_projection(call: Call) -> None:
    """The signs are those by which the parameters themselves are projected, whose J is 1."""
    signs = jacfunc.random_projection(Itself(call.params), 5)(torch.ones(1, 1))[0]
    projected = jacfunc.random_projection(call.module, 5)(call.wrap(call.x))
    call.same(call.pick(projected), call.matrix @ signs.to(call.matrix))


class Itself(nn.Module):
    """A module that returns its parameters, all in a row; they have the names that are given."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, param in params.items():
            *parents, last = name.split(".")
            home: nn.Module = self
            for parent in parents:
                if parent not in dict(home.named_children()):
                    home.add_module(parent, nn.Module())
                home = home.get_submodule(parent)
            home.register_parameter(last, param)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parameters()]).expand(len(x), -1)


def stream_params(call: Call) -> None:
    blocks = jacfunc.stream_jacobian(call.module, per_sample=True)(call.wrap(call.x))
    call.same({name: call.pick(block) for name, block in blocks}, call.each)


def stream_samples(call: Call) -> None:
    blocks = jacfunc.stream_jacobian(call.module, "samples", per_sample=True)(call.wrap(call.x))
    parts = [call.pick(block) for _, block in blocks]
    call.same({name: torch.cat([part[name] for part in parts]) for name in call.each}, call.each)


def operator(call: Call) -> None:
    """``Jᵀ u`` of the tensor that is compared, with zeros for all other outputs."""
    J = jacfunc.module_operator(call.module, per_sample=True)(call.wrap(call.x))
    picked = call.pick(J.outputs)
    only = jacfunc._trees.map_tensors(
        lambda out: out if out is picked else torch.zeros_like(out), J.outputs
    )
    got = J.T @ only
    rows, outputs = call.matrix.flatten(0, 1), call.output.flatten().to(call.matrix)
    call.same(torch.cat([block.reshape(-1) for block in got.values()]), rows.mT @ outputs)


DOORS: dict[str, Callable[[Call], None]] = {
    "whole": whole,
    "whole, reverse": lambda call: whole(call, "reverse"),
    **{f"per sample, {s}": (lambda call, s=s: per_sample(call, s)) for s in STRATEGIES},
    **{f"inputs, {s}": (lambda call, s=s: inputs(call, s)) for s in STRATEGIES[:3]},
    "outputs": full_output,
    "ntk": ntk,
    "diagonal": diagonal,
    "product": product,
    "gradient_norms": gradient_norms,
    "random_projection": random_projection,
    "stream by params": stream_params,
    "stream by samples": stream_samples,
    "operator": operator,
}
"""What each door must give."""
