"""Public functions: Gauss-Newton and Fisher matrices of modules, and norms of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jacfunc._curvature.gauss_newton import GaussNewton
from jacfunc._curvature.likelihoods import Likelihood, check_likelihood, drawn
from jacfunc._curvature.loss import Captured, Loss, LossFunction
from jacfunc._factored import norms
from jacfunc._lending import Select
from jacfunc._lock import alone
from jacfunc._modules import BatchOptions, BatchOutputs, Independence, Independent
from jacfunc._types import Randomness, Tree


def ggn(
    module: nn.Module,
    loss: LossFunction,
    *,
    select: Select = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    independent: Independent = None,
    copy: bool = True,
) -> Callable[..., GaussNewton]:
    """The generalized Gauss-Newton matrix of a loss, from factors of layers and without J.

    ``G = Σ_b J_bᵀ H_b J_b``, with ``J_b = ∂ module(x_b) / ∂ params`` and ``H_b`` the second
    derivative of the loss in the outputs of sample b: positive semidefinite where the loss is
    convex in the outputs, and for cross entropy and squared error the Fisher matrix, scaled as
    the loss is (Schraudolph 2002; Martens 2020). The diagonal is BackPACK's (Dangel et al. 2020),
    of whatever the module is made of.

    Args:
        module: any ``nn.Module`` whose outputs have the batch in front.
        loss: ``loss(outputs, targets)`` of the batch, one number, as in training: a mean or sum
            over samples. It gets what the module returns.
        select: parameters, as in :func:`jacfunc.module_jacobian`: ``"head.*"`` for the last layer.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: along the batch, as in :func:`jacfunc.module_jacobian`; the same numbers are
            drawn for all that is asked.
        chunk_size: samples taken at once; None takes all, evaluated only once.
        independent: each sample is taken alone, as a batch of one; True skips, ``"always"``
            insists on looking whether others change it, as in :func:`jacfunc.module_jacobian`.
        copy: later answers are computed from copies of parameters, buffers and the batch. With
            False the tensors themselves are kept, which takes less time and memory. They must then
            stay as they are: writes that torch counts are refused, those by ``.data`` or NumPy are
            not noticed.

    Returns:
        A function of the module's own inputs and, last among those by position, the targets. It
        returns a :class:`jacfunc.GaussNewton`: products, diagonal, blocks, the whole matrix.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        NotImplementedError: inside a transform, and a module that does not run under vmap.

    Cost:
        Nothing yet; see :class:`jacfunc.GaussNewton`.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(2, 3)
        >>> G = jacfunc.ggn(model, torch.nn.functional.cross_entropy)(
        ...     torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
        ... )
        >>> {name: tuple(block.shape) for name, block in G.blocks().items()}
        {'weight': (6, 6), 'bias': (3, 3)}
        >>> v = {name: torch.ones_like(param) for name, param in model.named_parameters()}
        >>> float((G @ v)["bias"].abs().max()) < 1e-6  # softmax does not see a shift of all classes
        True
    """
    options = BatchOptions(
        "ggn",
        module,
        select,
        in_dims,
        randomness,
        chunk_size,
        Independence.of("ggn", independent, chunk_size),
        copy=copy,
    )

    def ggn_of(*args: Tree, **kwargs: Any) -> GaussNewton:
        at_batch, targets = options.with_targets(args, kwargs, is_kept=True)

        captured = Captured.of(loss)

        def curvature_of(outputs: BatchOutputs) -> Loss:
            return Loss("ggn", loss, targets, outputs, captured)

        return GaussNewton(at_batch, curvature_of)

    return ggn_of


def fisher(
    module: nn.Module,
    likelihood: Likelihood,
    *,
    draws: int = 1,
    reduction: Literal["mean", "sum"] = "mean",
    generator: torch.Generator | None = None,
    select: Select = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    independent: Independent = None,
    copy: bool = True,
) -> Callable[..., GaussNewton]:
    """The Fisher matrix by Monte Carlo: of gradients at targets that the module itself predicts.

    ``F = Σ_b 1/K Σ_k g_bk g_bkᵀ``, ``g_bk = -∂ log p(y_bk | x_b) / ∂ params`` with ``y_bk`` drawn
    from ``p(· | x_b)``. Its expectation is the Gauss-Newton matrix of the negative log likelihood
    (Martens 2020), at K cotangents a sample rather than one for each output: for many classes.

    Args:
        module: any ``nn.Module`` whose outputs have the batch in front.
        likelihood: ``"categorical"``, of logits with the classes in the last dimension, or
            ``"gaussian"``, of means, with unit variance. Positions of a sample are independent.
        draws: targets of each sample.
        reduction: ``"mean"`` or ``"sum"`` over samples; positions are always added up.
        generator: to draw from, on the device of the outputs; torch's default one if None.
        select: parameters, as in :func:`jacfunc.module_jacobian`.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: of the module along the batch, as in :func:`jacfunc.module_jacobian`.
        chunk_size: samples taken at once; None takes all.
        independent: each sample is taken alone, as a batch of one; True skips, ``"always"``
            insists on looking whether others change it, as in :func:`jacfunc.module_jacobian`.
        copy: later answers are computed from copies of parameters, buffers and the batch. With
            False the tensors themselves are kept, which takes less time and memory. They must then
            stay as they are: writes that torch counts are refused, those by ``.data`` or NumPy are
            not noticed.

    Returns:
        A function of the module's own inputs, which draws and returns a
        :class:`jacfunc.GaussNewton`: the matrix of these draws, whatever is asked of it.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        NotImplementedError: inside a transform, and a module that does not run under vmap.

    Cost:
        One evaluation, kept; then see :class:`jacfunc.GaussNewton`, with ``R = draws``.

    Example:
        >>> import torch, jacfunc
        >>> model, x = torch.nn.Linear(2, 3), torch.ones(4, 2)
        >>> generator = torch.Generator().manual_seed(0)
        >>> F = jacfunc.fisher(model, "gaussian", draws=10_000, generator=generator)(x)
        >>> (F.diagonal()["bias"] - 1).abs().max() < 0.05
        tensor(True)
    """
    options = BatchOptions(
        "fisher",
        module,
        select,
        in_dims,
        randomness,
        chunk_size,
        Independence.of("fisher", independent, chunk_size, by_rows=False),
        copy=copy,
    )
    check_likelihood("fisher", likelihood, draws, reduction)

    def fisher_of(*args: Tree, **kwargs: Any) -> GaussNewton:
        at_batch = options.at((args, kwargs), is_kept=True)
        leaves, is_mean = at_batch.outputs.leaves, reduction == "mean"
        with alone():
            curvature = drawn("fisher", likelihood, leaves, draws, generator, is_mean)
        return GaussNewton(at_batch, lambda outputs: curvature)

    return fisher_of


def gradient_norms(
    module: nn.Module,
    loss: LossFunction,
    *,
    select: Select = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    independent: Independent = None,
) -> Callable[..., Tensor]:
    """Norms of every sample's gradient, from factors of layers: no gradient is written out.

    ``‖g_b‖`` with ``Σ_b g_b = ∇ loss``: what each sample adds to the gradient, which under a mean
    over the batch is 1/B of its own. For a linear layer at one position this is the product of two
    norms (Goodfellow 2015); at several, of two Gram matrices, if these are smaller.

    Args:
        module: any ``nn.Module`` whose outputs have the batch in front.
        loss: ``loss(outputs, targets)`` of the batch, one number.
        select: parameters, as in :func:`jacfunc.module_jacobian`.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: along the batch, as in :func:`jacfunc.module_jacobian`.
        chunk_size: samples taken at once; None takes all, evaluated only once.
        independent: each sample is taken alone, as a batch of one; True skips, ``"always"``
            insists on looking whether others change it, as in :func:`jacfunc.module_jacobian`.

    Returns:
        A function of the module's own inputs and, last among those by position, the targets. It
        returns ``[B]``.

    Raises:
        TypeError, ValueError: arguments that do not fit, a module that couples samples, a loss
            whose gradient in one sample's outputs changes with those of others.
        NotImplementedError: inside a transform, and a module that does not run under vmap.

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
    independence = Independence.of("gradient_norms", independent, chunk_size, by_rows=False)
    options = BatchOptions(
        "gradient_norms", module, select, in_dims, randomness, chunk_size, independence
    )

    def gradient_norms_of(*args: Tree, **kwargs: Any) -> Tensor:
        at_batch, targets = options.with_targets(args, kwargs)
        at_outputs = Loss("gradient_norms", loss, targets, at_batch.outputs)
        at_outputs.check_samples(options.independence)
        gradient = at_outputs.gradient()
        like = torch.cat([leaf.new_empty(0) for leaf in (*gradient, *at_batch.params.values())])
        chunks = []
        for samples, jacobian in at_batch.factors():
            cotangents = tuple(leaf[samples].unsqueeze(0) for leaf in gradient)
            named = at_batch.parts_of(jacobian, cotangents).items()
            with at_batch.contracting():
                pairs = [(parts, at_batch.params[name]) for name, parts in named]
                none = like.new_zeros(cotangents[0].shape[1])
                chunks.append(norms(pairs)[0].sqrt() if pairs else none)
        return torch.cat(chunks).to(like.dtype)

    return gradient_norms_of
