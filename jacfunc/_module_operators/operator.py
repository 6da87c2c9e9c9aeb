"""The door to the Jacobian of a module as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from jacfunc._arguments import check_flags
from jacfunc._lending import Select, check_outermost
from jacfunc._module_operators.evaluated import Evaluated
from jacfunc._module_operators.one_batch import ModuleOperator
from jacfunc._module_operators.over_batches import OverBatches
from jacfunc._modules import (
    BatchOptions,
    Independent,
    Key,
    ModuleOptions,
    Wrt,
    argnums_of,
    batching_of,
)
from jacfunc._outputs import Outputs, of_many
from jacfunc._showing import Progress, check_progress, named
from jacfunc._trees import is_batch
from jacfunc._types import Memory, OfParams, Randomness, Tree
from jacfunc.operators import LinearOperator

API = "module_operator"


def module_operator(
    module: nn.Module | OfParams[Any],
    wrt: Wrt | tuple[Wrt, ...] = "params",
    *,
    select: Select = None,
    inputs: Key | Sequence[Key] | None = None,
    outputs: Outputs = None,
    per_sample: bool = False,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    memory: Memory = None,
    independent: Independent = None,
    copy: bool = True,
    progress: Progress | None = None,
) -> Callable[..., LinearOperator]:
    """The Jacobian of a module at a batch as a linear operator: products, without J.

    ``J v`` and ``Jᵀ u`` with ``J = ∂ module(*inputs) / ∂ params``: a dict of directions by name
    gives a tree like the output, and the other way round.

    Args:
        module: any ``nn.Module``; with ``per_sample`` a function ``func(params, *inputs)``, too,
            which is called with batches.
        wrt: ``"params"``, ``"inputs"``, or a tuple of both: what the vectors are like.
        select: which parameters, as in :func:`jacfunc.module_jacobian`.
        inputs: which inputs, as in :func:`jacfunc.module_jacobian`.
        outputs: which outputs, as in :func:`jacfunc.module_jacobian`: the others are no part of the
            operator, which maps to ``[R]``, per sample to ``[B, R]``.
        per_sample: samples do not depend on each other, which is seen to. Products are then the
            same; ``solve`` and the like may take samples apart.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: along the batch, as in :func:`jacfunc.module_jacobian`.
        chunk_size: samples taken at once where samples are taken apart; None takes all.
        memory: bytes that answers may take where samples are taken apart.
        independent: look whether samples depend on each other, as in
            :func:`jacfunc.module_jacobian`.
        copy: answer from copies of parameters, buffers and the batch, as in :func:`jacfunc.ggn`.
        progress: for an iterable of batches: wraps it at each pass (``tqdm.tqdm``).

    Returns:
        A function of the module's own inputs, or of an iterable of batches, such as a
        ``DataLoader``, which is passed through for each product and must give the same batches in
        the same order. It returns a :class:`jacfunc.LinearOperator`. It answers from the point at
        which it was made. Results are detached from the parameters; products can be differentiated
        by their vectors.

    Raises:
        TypeError, ValueError: arguments that do not fit; with ``per_sample`` samples that depend on
            each other; batches that change from pass to pass.
        NotImplementedError: inside a transform, and what torch refuses.

    Cost:
        One evaluation of the batch; then as of :func:`jacfunc.linearize`. With ``per_sample`` and
        few outputs a sample later calls of a kind need no more for ``gram``, ``lstsq``, ``quad``
        and products with ``Jᵀ``. Of an iterable one evaluation of each batch at first, and one for
        each product.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> J = jacfunc.module_operator(model)(torch.ones(4, 3))
        >>> J.shape, J.rmv(torch.ones(4, 2))["bias"]
        ((8, 8), tensor([4., 4.]))
        >>> batches = [torch.ones(4, 3), torch.ones(2, 3)]
        >>> jacfunc.module_operator(model)(batches).rmv(torch.ones(6, 2))["bias"]
        tensor([6., 6.])
    """
    check_flags(API, per_sample=per_sample)
    check_progress(API, progress)
    batching = batching_of(API, per_sample, in_dims, randomness)
    kind = BatchOptions if per_sample else ModuleOptions
    options = kind.read(
        *(API, module, select, batching, chunk_size, memory, independent, chunk_size),
        copy=copy,
        outputs=outputs,
    )
    argnums = argnums_of(API, wrt)

    def operator_of(*args: Tree, **kwargs: Any) -> LinearOperator:
        check_outermost(API, (args, kwargs), "jacfunc.linearize or jacfunc.module_jacobian")
        if kwargs or len(args) != 1 or is_batch(args[0]):
            return ModuleOperator(Evaluated.at(options, (args, kwargs), argnums, inputs))
        frozen = replace(options, stays=True, outputs=of_many(options.outputs))
        return OverBatches(
            API,
            lambda args: Evaluated.at(frozen, (args, {}), argnums, inputs).checked(),
            args[0],
            progress,
        )

    return named(API, module, operator_of)
