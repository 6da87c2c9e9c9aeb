"""Second derivatives: the Jacobian of a call as a call itself, and a strategy for it alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from jacfunc._assembly import Sink, Sweep, sweep_leaves
from jacfunc._calls import FlatCall
from jacfunc._errors import ManyOutputs, Refused, check_uncompiled
from jacfunc._linear_map import (
    Derivative,
    JacobianOperator,
    check_numbers,
    chosen_leaves,
    is_followed,
    nonzero_numbers,
    one_by_one,
    pull_of_push,
    pull_of_pushes,
)
from jacfunc._remembered import CallKind
from jacfunc._torch import is_outermost, untracked
from jacfunc._types import Blocks, LeafFunction, Leaves, Tree
from jacfunc.strategies._forward import Forward
from jacfunc.strategies._reverse import Reverse
from jacfunc.strategies._strategy import InChunks, Strategy


class FirstDerivative(Derivative):
    """The reverse-mode Jacobian of a leaf function, block by block.

    Args:
        func: the function.
        primals: the point.
        chosen: numbers of rows of the only primal, along its first dimension; None for all. No
            other row of the Hessian is swept.
        of_one_number: must the function return a single number?
    """

    def __init__(
        self,
        func: LeafFunction,
        primals: Leaves,
        chosen: Tensor | None = None,
        of_one_number: bool = False,
    ) -> None:
        super().__init__(func)
        self.primals = primals
        self.chosen = chosen
        self._of_one_number = of_one_number

    def take(self, operator: JacobianOperator) -> None:
        """Evaluate this derivative, which no graph is kept of, for its Jacobian ``operator``."""
        operator.rewind_generators()
        operator.keep_image(*operator.refusing("pull back", lambda: self(*operator.primals)))

    def check_outputs(self, outputs: Leaves) -> bool:
        """Does the function return one number? Refuse it, if it must and does not."""
        is_one_number = len(outputs) == 1 and outputs[0].numel() == 1
        if self._of_one_number and not is_one_number:
            shapes = [tuple(out.shape) for out in outputs]
            raise ManyOutputs(
                f"func must return one number, got tensors of the shapes {shapes}. Differentiate "
                "one of them, or their sum, or take the whole by hessian."
            )
        return is_one_number

    def rows(self, operator: JacobianOperator) -> Leaves:
        """Blocks ``[*out, *in]``, one output after the other; of inputs the chosen rows alone."""
        outputs = operator.outputs
        is_one_number = self.check_outputs(outputs)
        if is_one_number and is_outermost():
            blocks: Blocks = (_only_row(operator, outputs[0]),)
        else:
            blocks = Reverse().materialize(operator)
        if self.chosen is None:
            return tuple([block for row in blocks for block in row])
        pairs = zip(outputs, blocks, strict=True)
        return tuple([row[0].index_select(out.dim(), self.chosen) for out, row in pairs])

    def product(
        self, operator: JacobianOperator, v: Leaves, by: Strategy, last: bool = False
    ) -> Leaves:
        """``H v``, ``[*in]`` → ``[*in]``, for a function that returns one number.

        Args:
            operator: the Jacobian of this derivative.
            by: the strategy whose order of modes is taken.
            last: is it the last product, so that a graph may be freed?
        """
        primals = operator.primals
        if isinstance(by, ReverseOverForward):
            operator.rewind_generators()
            result, (outputs, extras) = pull_of_push(self.func, primals, v, 0)
            self.check_outputs(outputs)
            if not operator.is_evaluated:
                self.num_values = len(outputs)
                operator.keep_image((), (*outputs, *extras))
            return result
        if isinstance(by, Forward):
            products = operator.pushforward(v)
            pairs = zip(products, primals, strict=True)
            return tuple([x.to(primal.dtype).view_as(primal) for x, primal in pairs])
        pairs = zip(v, operator.outputs, strict=True)
        seeds = tuple([seed.to(row.dtype).view_as(row) for seed, row in pairs])
        return operator.pullback(seeds, last=last)

    def products(self, operator: JacobianOperator, V: Leaves, by: Strategy) -> Leaves:
        """``H v`` of K vectors at once, ``[K, *in]`` → ``[K, *in]``; see :meth:`product`."""
        if is_followed(V) or len(V[0]) == 1:
            return one_by_one(lambda v: self.product(operator, v, by), V)
        size = V[0].shape[:1]
        if isinstance(by, ReverseOverForward):
            return pull_of_pushes(self.func, operator, V, 0)
        if isinstance(by, Forward):
            pushed = zip(operator.pushforward_batch(V), operator.primals, strict=True)
            return tuple([x.to(primal.dtype).view(size + primal.shape) for x, primal in pushed])
        of = nonzero_numbers(V)  # zeros would spoil products at infinite derivatives
        pairs = zip(chosen_leaves(V, of), chosen_leaves(operator.outputs, of), strict=True)
        rows = tuple([seed.to(row.dtype).reshape(size + row.shape) for seed, row in pairs])
        return operator.pullback_batch(rows, of) if rows else tuple(map(torch.zeros_like, V))


class SecondCall(FirstDerivative):
    """The Jacobian of a call as a call itself: its own Jacobian is the Hessian, in user's trees."""

    def __init__(
        self, call: FlatCall, chosen: Tensor | None = None, of_one_number: bool = False
    ) -> None:
        super().__init__(call, call.primals, chosen, of_one_number)
        self._call = call

    @property
    def call_kind(self) -> CallKind:
        """The identity of this call, which has other plans than the call itself."""
        size = None if self.chosen is None else len(self.chosen)
        return self._call.call_kind.among("twice", size)

    @property
    def may_share_module(self) -> bool:
        """May the function call a module, which another thread may be lending?"""
        return self._call.may_share_module

    def value(self, _rows: Leaves, extras: Leaves) -> tuple[Tree, Tree]:
        """The function's own ``(output, aux)``."""
        return self._call.value(extras[: self.num_values], extras[self.num_values :])

    def jacobian(self, blocks: Blocks) -> Tree:
        """The Hessian: an output tree of input trees of input trees of blocks."""
        call, count = self._call, len(self.primals)
        trees = [call.input_tree(row) for row in blocks]
        rows = [call.input_tree(trees[i : i + count]) for i in range(0, len(trees), count)]
        return call.output_tree(rows)

    @property
    def output_shapes(self) -> list[torch.Size]:
        """The shapes of the output leaves, as the function returned them."""
        return self._call.output_shapes


def _only_row(operator: JacobianOperator, out: Tensor) -> Leaves:
    """The gradient of one number ``[*out]``, as blocks ``[*out, *in]``."""
    with untracked():
        seed = torch.ones_like(out)
    products = operator.pullback((seed,))
    with untracked():
        if out.dim():
            products = tuple([product.reshape(out.shape + product.shape) for product in products])
        # a block has the dtype of both
        return tuple([x.to(torch.promote_types(x.dtype, out.dtype)) for x in products])


@dataclass(frozen=True)
class ReverseOverForward(InChunks):
    """Pulls back through pushforwards: rows of a Hessian, ``chunk_size`` at once, vmapped.

    It differentiates no backward pass, so that it may do where torch has no second one.

    Args:
        chunk_size: rows swept at once; None sweeps all.

    Raises:
        TypeError, ValueError: if ``chunk_size`` is no positive integer.
        NotImplementedError: when it sweeps anything but a Hessian, or inside ``torch.compile``.

    Cost:
        An evaluation, a pushforward and a pullback for each row, which all keep their graph.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.strategies import ReverseOverForward
        >>> jacfunc.hessian(lambda x: x.prod(), strategy=ReverseOverForward())(torch.ones(2))
        tensor([[0., 1.],
                [1., 0.]])
    """

    def into(self, sink: Sink, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out, *in, *in]``; no graph of the gradient is made."""
        # compilers run no watch, without which a normalization's pushforward has wrong derivatives
        check_uncompiled("reverse-over-forward", "Take 'forward-over-reverse' there.")
        if not isinstance(operator.func, FirstDerivative):
            raise Refused("reverse over forward takes second derivatives alone; use hessian")
        operator.func.take(operator)
        return super().into(sink, operator)

    def products(self, operator: JacobianOperator) -> Sweep:
        """Rows, by pullbacks of vmapped pushforwards."""
        second = operator.func
        assert isinstance(second, FirstDerivative)
        return partial(sweep_leaves, partial(_pulled, operator, second), operator.outputs)


def _pulled(
    operator: JacobianOperator, second: FirstDerivative, seeds: Leaves, of: slice = slice(0, 1)
) -> Leaves:
    """Rows ``[K, *in]`` for unit seeds ``[K, *out, *in]`` of the block with this number."""
    primals = operator.primals
    if not seeds or not len(seeds[0]):
        return tuple([primal.new_empty((0, *primal.shape)) for primal in primals])
    (unit,), (output, number) = seeds, divmod(of.start, len(primals))
    size, own = len(unit), primals[number]
    split = unit.dim() - own.dim()  # a unit seed is the product of one of an output and an input
    cotangent = unit.flatten(split).sum(-1) if own.dim() else unit
    tangent = unit.flatten(1, split - 1).sum(1) if split > 1 else unit
    if second.chosen is not None:
        zeros = tangent.new_zeros((size, *own.shape))
        tangent = zeros.index_add(1, second.chosen, tangent)
    tangents = [primal.new_zeros((size, *primal.shape)) for primal in primals]
    tangents[number] = tangent.to(own.dtype)
    values = operator.image()[1]
    seeds = *tangents, cotangent.to(values[output].dtype)
    return check_numbers(pull_of_pushes(second.func, operator, seeds, output))
