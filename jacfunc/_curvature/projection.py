"""Public function: random projections of every sample's Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from jacfunc._assembly import shared_units
from jacfunc._curvature.loss import Loss, LossFunction
from jacfunc._curvature.signs import SignMatrix, projected
from jacfunc._factored import FactoredJacobian
from jacfunc._lending import Select
from jacfunc._linear_map import LeafNumbers
from jacfunc._modules import BatchOptions, Independence, Independent, ModuleAtBatch
from jacfunc._types import Leaves, Randomness, Tree, product_dtype

API = "random_projection"


def random_projection(
    module: nn.Module,
    size: int,
    loss: LossFunction | None = None,
    *,
    seed: int = 0,
    select: Select = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    independent: Independent = None,
) -> Callable[..., Any]:
    """Every sample's Jacobian times a fixed random matrix, which is never whole in memory.

    ``J_b R`` with ``R`` of random signs ``±1/√size``, so that ``E[(J_b R)(J_c R)ᵀ] = J_b J_cᵀ``
    (Johnson and Lindenstrauss 1984): the features of TRAK (Park et al. 2023). Seed, size and the
    names of the parameters fix R, whatever the batch, the device or the chunks.

    Args:
        module: any ``nn.Module`` whose outputs have the batch in front.
        size: columns of R.
        loss: ``loss(outputs, targets)`` of the batch, one number: its gradient, as far as each
            sample adds to it, is projected instead of the Jacobian.
        seed: of R.
        select: parameters, as in :func:`jacfunc.module_jacobian`.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: of the module along the batch, as in :func:`jacfunc.module_jacobian`.
        chunk_size: samples taken at once; None takes all.
        independent: each sample is taken alone, as a batch of one; True skips, ``"always"``
            insists on looking whether others change it, as in :func:`jacfunc.module_jacobian`.

    Returns:
        A function of the module's own inputs, which returns ``[B, *out, size]`` for each output
        leaf; with a loss also of the targets, last among the arguments by position, which returns
        ``[B, size]``.

    Raises:
        TypeError, ValueError: arguments that do not fit, a module or a loss that couples samples.
        NotImplementedError: inside a transform, and a module that does not run under vmap.

    Cost:
        One evaluation, M pullbacks at once (two and one with a loss, in chunks), and at most
        ``2 · B · M · P · size`` operations; P · size random bits for every chunk of samples. A
        chunk's rows of one parameter are written out where that costs less.

    Example:
        >>> import torch, jacfunc
        >>> model, x = torch.nn.Linear(20, 3), torch.ones(4, 20)
        >>> features = jacfunc.random_projection(model, 512, seed=1)(x)
        >>> features.shape
        torch.Size([4, 3, 512])
        >>> bool(features[0, 0] @ features[1, 0] / 21 - 1 < 0.3)  # of J Jᵀ, which is 21
        True
    """
    independence = Independence.of(API, independent, chunk_size, by_rows=loss is None)
    options = BatchOptions(API, module, select, in_dims, randomness, chunk_size, independence)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"{API}: size must be a positive number of columns, got {size!r}. "
            "Some hundreds are usual."
        )

    def random_projection_of(*args: Tree, **kwargs: Any) -> Tree:
        if loss is None:
            return _of_jacobians(options.at((args, kwargs)), size, seed)
        at_batch, targets = options.with_targets(args, kwargs)
        at_outputs = Loss(API, loss, targets, at_batch.outputs)
        at_outputs.check_samples(options.independence)
        gradient = at_outputs.gradient()
        chunks = [
            _projected(
                at_batch, jacobian, tuple(x[chunk].unsqueeze(0) for x in gradient), size, seed
            )
            for chunk, jacobian in at_batch.factors()
        ]
        return torch.cat(chunks).squeeze(1)

    return random_projection_of


def _of_jacobians(at_batch: ModuleAtBatch, size: int, seed: int) -> Tree:
    """A tree like the outputs, of ``[B, *out, size]``."""
    chunks: list[Leaves] = []
    for _, jacobian in at_batch.factors():
        leaves = [slice(number, number + 1) for number in range(len(jacobian.outputs))]
        units = [shared_units(jacobian.outputs[of]) for of in leaves]
        rows = [
            _projected(at_batch, jacobian, seeds, size, seed, of)
            for seeds, of in zip(units, leaves, strict=True)
        ]
        pairs = zip(rows, jacobian.sample_outputs, strict=True)
        chunks.append(tuple(x.reshape(len(x), *leaf.shape, size) for x, leaf in pairs))
    return at_batch.last_call.output_tree([torch.cat(leaf) for leaf in zip(*chunks, strict=True)])


def _projected(
    at_batch: ModuleAtBatch,
    jacobian: FactoredJacobian,
    cotangents: Leaves,
    size: int,
    seed: int,
    of: LeafNumbers | None = None,
) -> Tensor:
    """The projection ``[B, K, size]`` of what cotangents ``[K, B, *out]`` are pulled back to."""
    parts_by_name = at_batch.parts_of(jacobian, cotangents, of)
    leaves = (*cotangents, *at_batch.params.values())
    dtype = reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
    num_seeds, num_samples = cotangents[0].shape[:2]
    shape = (num_samples, num_seeds, size)
    total = cotangents[0].new_zeros(shape, dtype=product_dtype(*leaves))
    with at_batch.contracting():
        for name, parts in parts_by_name.items():
            zeros = partial(total.new_zeros, (*total.shape[:2], *at_batch.params[name].shape))
            # a compiled module gives its parameters longer names
            plain_name = name.replace("_orig_mod.", "")
            total += projected(parts, zeros, SignMatrix(f"{seed}:{plain_name}", size, total))
    return total.to(dtype)
