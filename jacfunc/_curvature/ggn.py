"""Public functions: Gauss-Newton and Fisher matrices of modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Unpack, overload

import torch
from torch import nn

from jacfunc._curvature.chosen import KnownLoss, Unweighted, drawn_of, loss_of, outputs_of
from jacfunc._curvature.gauss_newton import GaussNewton
from jacfunc._curvature.loss import LossFunction
from jacfunc._lending import Captured, Select
from jacfunc._lock import alone
from jacfunc._losses import Likelihood, Predictive, TorchLoss, check_draws, check_loss
from jacfunc._modules import Batching, BatchOptions, Independent, RowOptions
from jacfunc._outputs import Outputs
from jacfunc._showing import named
from jacfunc._types import Memory, OfParams, Params, Randomness, Tree


class GgnOptions(RowOptions, total=False):
    """Options of :func:`ggn`, by name."""

    copy: bool


class FisherOptions(GgnOptions, total=False):
    """Options of :func:`fisher`, by name."""

    draws: int
    reduction: Literal["mean", "sum"] | None
    generator: torch.Generator | None


@overload
def ggn(
    module: nn.Module, loss: LossFunction | None, **options: Unpack[GgnOptions]
) -> Callable[..., GaussNewton]: ...
@overload
def ggn(
    module: OfParams[Params], loss: LossFunction | None, **options: Unpack[GgnOptions]
) -> Callable[..., GaussNewton[Params]]: ...
def ggn(
    module: nn.Module | Callable[..., Any],
    loss: LossFunction | None,
    *,
    select: Select = None,
    outputs: Outputs = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    memory: Memory = None,
    independent: Independent = None,
    copy: bool = True,
) -> Callable[..., GaussNewton[Any]]:
    """The generalized Gauss-Newton matrix of a loss, from factors of layers and without J.

    ``G = Σ_b J_bᵀ H_b J_b``, with ``J_b = ∂ module(x_b) / ∂ params`` and ``H_b`` the second
    derivative of the loss in the outputs of sample b: positive semidefinite where the loss is
    convex in the outputs, and for cross entropy and squared error the Fisher matrix, scaled as
    the loss is (Schraudolph 2002; Martens 2020). The diagonal is BackPACK's (Dangel et al. 2020),
    of whatever the module is made of.

    Args:
        module: any ``nn.Module``, or a function ``func(params, *inputs)`` of a tree of parameters,
            with the batch in front of its outputs.
        loss: ``loss(outputs, targets)`` of the batch, one number, as in training: a mean or sum
            over samples. It gets what the module returns. None with ``outputs`` stands for half
            the sum of their squares, without targets: ``G = Σ_b Σ_r J_bᵀ c_br c_brᵀ J_b``.
        select: parameters, as in :func:`jacfunc.module_jacobian`: ``"head.*"`` for the last layer.
            Those of a function are all floating tensors in its tree, by their paths:
            ``"layers.0.weight"``.
        outputs: which outputs, as in :func:`jacfunc.module_jacobian`. ``H_b`` is the second
            derivative in these alone; the others are constants to the loss, still among the classes
            of a softmax, for example. Cotangents of one's own need ``loss=None``.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: along the batch, as in :func:`jacfunc.module_jacobian`; the same numbers are
            drawn for all that is asked.
        chunk_size: samples taken at once; None takes all, evaluated only once.
        memory: bytes that a call may take, as a number or in words (``"2 GiB"``), with what it
            returns and keeps: as many samples are taken at once as fit. Batches are compared
            before, eight samples at once, which ``independent=True`` skips. Products
            take the batch as a whole, and are not bounded.
        independent: each sample is taken alone, as a batch of one; True skips, ``"always"``
            insists on looking whether others change it, as in :func:`jacfunc.module_jacobian`.
        copy: later answers are computed from copies of parameters, buffers and the batch. With
            False the tensors themselves are kept, which takes less time and memory. They must then
            stay as they are: writes that torch counts are refused, those by ``.data`` or NumPy are
            not noticed.

    Returns:
        A function of the module's own inputs, or of the function's, its parameters first; and, last
        among those by position, of the targets. It returns a :class:`jacfunc.GaussNewton`:
        products, diagonal, blocks, the whole matrix.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        NotImplementedError: inside a transform, and a module that torch can't differentiate.

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

        Of a function, answers have the tree of its parameters:

        >>> def linear(params, x):
        ...     return x @ params["w"]
        >>> G = jacfunc.ggn(linear, torch.nn.functional.mse_loss)
        >>> G({"w": torch.ones(2, 1)}, torch.eye(2), torch.ones(2, 1)).diagonal()
        {'w': tensor([[1.],
                [1.]])}
    """
    options = BatchOptions.read(
        *("ggn", module, select, Batching(in_dims, randomness), chunk_size, memory),
        *(independent, chunk_size),
        copy=copy,
        outputs=outputs,
    )
    if loss is not None or options.outputs is None:
        check_loss("ggn", loss)
    # a function of torch itself closes over nothing
    of_function = None if isinstance(loss, partial | nn.Module) else TorchLoss.of(loss)

    def ggn_of(*args: Tree, **kwargs: Any) -> GaussNewton[Any]:
        if loss is None:
            return GaussNewton(options.at((args, kwargs), is_kept=True), Unweighted)
        known = of_function or TorchLoss.of(loss)
        at_batch, targets = options.with_targets((args, kwargs), known is not None, is_kept=True)
        captured = None if of_function else Captured.of(loss)
        every = targets, captured
        curvature_of = partial(loss_of, "ggn", loss, *every)
        return GaussNewton(at_batch, curvature_of, KnownLoss.of("ggn", known, *every))

    return named("ggn", module, ggn_of)


@overload
def fisher(
    module: nn.Module, likelihood: Likelihood, **options: Unpack[FisherOptions]
) -> Callable[..., GaussNewton]: ...
@overload
def fisher(
    module: OfParams[Params], likelihood: Likelihood, **options: Unpack[FisherOptions]
) -> Callable[..., GaussNewton[Params]]: ...
def fisher(
    module: nn.Module | Callable[..., Any],
    likelihood: Likelihood,
    *,
    draws: int = 1,
    reduction: Literal["mean", "sum"] | None = None,
    generator: torch.Generator | None = None,
    select: Select = None,
    outputs: Outputs = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    memory: Memory = None,
    independent: Independent = None,
    copy: bool = True,
) -> Callable[..., GaussNewton[Any]]:
    """The Fisher matrix by Monte Carlo: of gradients at targets that the module itself predicts.

    ``F = Σ_b 1/K Σ_k g_bk g_bkᵀ``, ``g_bk = -∂ log p(y_bk | x_b) / ∂ params`` with ``y_bk`` drawn
    from ``p(· | x_b)``. Its expectation is the Gauss-Newton matrix of the negative log likelihood
    (Martens 2020), at K cotangents a sample rather than one for each output: for many classes.

    Args:
        module: any ``nn.Module``, or a function ``func(params, *inputs)`` of a tree of parameters,
            with the batch in front of its outputs.
        likelihood: ``"categorical"``, of logits with the classes in the last dimension;
            ``"bernoulli"``, of logits; or ``"gaussian"``, of means, with unit variance. Positions
            of a sample are independent. Or a loss of torch, as a function, as a module, or in a
            ``functools.partial`` with settings: ``cross_entropy``, with the classes in dimension 1;
            ``mse_loss``, which is a Gaussian with variance 1/2 and without its constant;
            ``binary_cross_entropy_with_logits``; or ``poisson_nll_loss``, of logarithms of rates.
            The expectation is then that of :func:`ggn` with this loss. Class weights, smoothed
            labels and an ``ignore_index`` from 0 on are refused: with them it is no likelihood.
        draws: targets of each sample.
        reduction: ``"mean"`` or ``"sum"`` over samples, while positions are added up; of a loss,
            over all that it reduces. None: what the loss says, else the mean.
        generator: to draw from, on the device of the outputs; torch's default one if None.
        select: parameters, as in :func:`jacfunc.ggn`.
        outputs: which outputs, but no cotangents: the others are constants, as in :func:`ggn`.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: of the module along the batch, as in :func:`jacfunc.module_jacobian`.
        chunk_size: samples taken at once; None takes all.
        memory: bytes that a call may take, as in :func:`ggn`.
        independent: skip or insist on a look whether samples change each other, as in :func:`ggn`.
        copy: compute later answers from copies, as in :func:`ggn`.

    Returns:
        A function of the module's own inputs, or of the function's, its parameters first. It draws
        and returns a :class:`jacfunc.GaussNewton`: the matrix of these draws, whatever is asked.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        NotImplementedError: inside a transform, and a module that torch can't differentiate.

    Cost:
        One evaluation; then see :class:`jacfunc.GaussNewton`, with ``R = draws``.

    Example:
        >>> import torch, jacfunc
        >>> model, x = torch.nn.Linear(2, 3), torch.ones(4, 2)
        >>> generator = torch.Generator().manual_seed(0)
        >>> F = jacfunc.fisher(model, "gaussian", draws=10_000, generator=generator)(x)
        >>> (F.diagonal()["bias"] - 1).abs().max() < 0.05
        tensor(True)
        >>> F = jacfunc.fisher(model, torch.nn.functional.cross_entropy)(x)
        >>> F.matrix().shape
        torch.Size([9, 9])
    """
    options = BatchOptions.read(
        *("fisher", module, select, Batching(in_dims, randomness), chunk_size, memory),
        *(independent, chunk_size),
        by_rows=False,
        copy=copy,
        outputs=outputs,
    )
    check_draws("fisher", draws, generator)
    predictive = Predictive.of("fisher", likelihood, reduction)

    def fisher_of(*args: Tree, **kwargs: Any) -> GaussNewton[Any]:
        at_batch = options.at((args, kwargs), is_kept=True, keeps_all=True)
        drawn = partial(drawn_of, "fisher", predictive, outputs_of(at_batch), draws, generator)
        with alone():
            return GaussNewton(at_batch, at_batch.budget.keep(drawn))

    return named("fisher", module, fisher_of)
