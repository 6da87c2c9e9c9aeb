"""Public function: norms of every sample's gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from jacfunc._assembly import stack
from jacfunc._curvature.chosen import UnderLoss
from jacfunc._curvature.loss import Loss, LossFunction
from jacfunc._factored import FactoredJacobian, NamedParts, Part, norms
from jacfunc._lending import Select
from jacfunc._losses import TorchLoss, check_loss
from jacfunc._modules import Batching, BatchOptions, Independent, made_at_once
from jacfunc._rounding import contracting
from jacfunc._showing import named
from jacfunc._torch import recording
from jacfunc._trees import Arguments, flatten, map_tensors
from jacfunc._trials import BatchOutputs
from jacfunc._types import Leaves, Memory, Randomness, Tree, is_tensor


def gradient_norms(
    module: nn.Module | Callable[..., Any],
    loss: LossFunction,
    *,
    select: Select = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    memory: Memory = None,
    independent: Independent = None,
) -> Callable[..., Tensor]:
    """Norms of every sample's gradient, from factors of layers: no gradient is written out.

    ``‖g_b‖`` with ``Σ_b g_b = ∇ loss``: what each sample adds to the gradient, which under a mean
    over the batch is 1/B of its own. For a linear layer at one position this is the product of two
    norms (Goodfellow 2015); at several, of two Gram matrices, if these are smaller.

    Args:
        module: any ``nn.Module``, or a function ``func(params, *inputs)`` of a tree of parameters,
            with the batch in front of its outputs.
        loss: ``loss(outputs, targets)`` of the batch, one number.
        select: parameters, as in :func:`jacfunc.ggn`.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: along the batch, as in :func:`jacfunc.module_jacobian`.
        chunk_size: samples taken at once; None takes all, evaluated only once.
        memory: bytes that a call may take, as in :func:`jacfunc.ggn`.
        independent: skip or insist on a look whether samples change each other, as in
            :func:`jacfunc.ggn`.

    Returns:
        A function of the module's own inputs, or of the function's, its parameters first; and, last
        among those by position, of the targets. It returns ``[B]``.

    Raises:
        TypeError, ValueError: arguments that do not fit, a module that couples samples, a loss
            whose gradient in one sample's outputs changes with those of others.
        NotImplementedError: inside a transform, and a module that torch can't differentiate.

    Cost:
        One evaluation, one pullback, a contraction a layer; memory of all inputs and cotangents.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> loss = lambda out, y: (out - y).square().sum() / 2
        >>> x, y = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), model.weight.new_zeros(2, 1)
        >>> expected = model(x).detach().abs().flatten() * torch.tensor([5.0, 1.0])
        >>> torch.allclose(jacfunc.gradient_norms(model, loss)(x, y), expected)
        True
    """
    api, batching = "gradient_norms", Batching(in_dims, randomness)
    check_loss(api, loss)
    options = BatchOptions.read(
        api, module, select, batching, chunk_size, memory, independent, chunk_size, by_rows=False
    )

    def gradient_norms_of(*args: Tree, **kwargs: Any) -> Tensor:
        known = TorchLoss.of(loss)
        if known is not None and known.has_formula and isinstance(module, nn.Module):
            result = _made_at_once(options, known, (args, kwargs))
            if result is not None:
                return result
        # a user's loss may look at the module, which is lent meanwhile
        is_lent_once = known is not None
        at_batch, targets = options.with_targets((args, kwargs), is_lent_once)
        with at_batch.as_one():
            of_outputs = partial(_gradient, options, loss, targets, at_batch.outputs)
            gradient = at_batch.budget.keep(of_outputs)

            def norms_of(samples: slice, jacobian: FactoredJacobian) -> Leaves:
                cotangents = tuple([leaf[samples].unsqueeze(0) for leaf in gradient])

                def make(named: NamedParts) -> Tensor:
                    parts = [named.get(name, []) for name in at_batch.params]
                    return _norms(parts, at_batch.params.values(), cotangents)

                return (at_batch.contracted(jacobian, cotangents, make),)

            return stack(at_batch.pieces(norms_of), at_batch.size)[0]

    return named("gradient_norms", module, gradient_norms_of)


def _gradient(
    options: BatchOptions, loss: LossFunction, targets: Tree, outputs: BatchOutputs
) -> Leaves:
    """The gradient in the outputs ``[B, *out]``, to which each sample adds its own."""
    if any(is_tensor(x) and x.is_inference() for x in flatten(targets)[0]):
        with recording():  # copies, which a backward pass may keep
            targets = map_tensors(torch.clone, targets)
    at_outputs = Loss(options.api, loss, targets, outputs)
    at_outputs.check_samples(options.independence)
    return at_outputs.gradient()


def _made_at_once(options: BatchOptions, loss: TorchLoss, arguments: Arguments) -> Tensor | None:
    """The norms of a call of which earlier ones have settled all but the numbers; else None."""
    args, kwargs = arguments
    if not args or type(args[-1]) is not Tensor:
        return None
    kind, weights = loss.divided
    beside = args[-1], *weights
    result = made_at_once(options, (args[:-1], kwargs), NormsUnder(kind), beside)
    return None if result is None else result[0][0]


@dataclass(frozen=True)
class NormsUnder(UnderLoss):
    """Norms of all samples."""

    def __call__(self, jacobian: FactoredJacobian, beside: Leaves) -> Leaves:
        at_outputs = self.loss_at("gradient_norms", jacobian.outputs, beside)
        cotangents = tuple([leaf.unsqueeze(0) for leaf in at_outputs.gradient()])
        parts = jacobian.parts_of_cotangents(cotangents)
        with contracting(jacobian.params):
            return (_norms(parts, jacobian.params, cotangents),)


def _norms(
    parts: Iterable[Sequence[Part]], params: Collection[Tensor], cotangents: Leaves
) -> Tensor:
    """Norms ``[B]`` over all parameters, from the parts that cotangents ``[1, B, *out]`` have."""
    dtype = reduce(torch.promote_types, {leaf.dtype for leaf in (*cotangents, *params)})
    pairs = [pair for pair in zip(parts, params, strict=True) if pair[0]]
    if not pairs:
        return cotangents[0].new_zeros(cotangents[0].shape[1], dtype=dtype)
    return norms(pairs).to(dtype)
