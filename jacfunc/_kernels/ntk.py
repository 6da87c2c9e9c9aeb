"""Public functions: neural tangent kernels and Gramians ``J Jᵀ``, from the factors of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack, overload

from torch import nn

from jacfunc._arguments import check_chunk_size, check_flags, check_memory
from jacfunc._assembly import Places
from jacfunc._calls import Derivation, FlatCall
from jacfunc._errors import check_uncompiled
from jacfunc._kernels.blocks import KeptAxes, KernelOptions, SampleRange, kernel_at_once, product_of
from jacfunc._kernels.fitting import in_ranges
from jacfunc._kernels.sampled_function import (
    KernelSamples,
    SamplesAt,
    SingleCall,
    named_sides,
    samples_of,
    sides_of,
)
from jacfunc._lending import Select
from jacfunc._memory import Budget
from jacfunc._modules import (
    Batching,
    BatchOptions,
    FunctionAsModule,
    Independent,
    check_called,
    check_randomness_option,
)
from jacfunc._outputs import Outputs, choice_of
from jacfunc._showing import Progress, check_progress, named
from jacfunc._trees import map_tensors, positional
from jacfunc._types import Argnums, Memory, OutT, Randomness, Tree
from jacfunc.strategies import Structured, in_words_of

API = "ntk"


@overload
def ntk(
    func: nn.Module, params: Any, x1: Any, x2: Any = None, **options: Unpack[KernelOptions]
) -> Tree: ...
@overload
def ntk(
    func: Callable[..., OutT],
    params: Any,
    x1: Any,
    x2: Any = None,
    **options: Unpack[KernelOptions],
) -> OutT: ...


def ntk(
    func: nn.Module | Callable[..., Any],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    trace_axes: int | Sequence[int] = (),
    diagonal_axes: int | Sequence[int] = (),
    select: Select = None,
    outputs: Outputs = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    memory: Memory = None,
    out: Tree = None,
    independent: Independent = None,
    progress: Progress | None = None,
    batched: bool = False,
) -> Tree:
    """Empirical neural tangent kernel: contracts the factors of layers, J is never formed.

    ``K[a, b, *i, *j] = Σₚ J₁[a, *i, p] J₂[b, *j, p]`` over all parameters p.

    Args:
        func: a module, or ``func(params, *inputs)`` of a single sample (see ``batched``).
        params: of a function, the tree that it is differentiated by. Of a module None, or what
            ``select`` says.
        x1: a batch: a tensor, a dict or another tree, or a tuple of positional inputs; or a list
            or another iterable of batches, such as a ``DataLoader``.
        x2: another one; None for the kernel of the first with itself, of which half is computed.
        trace_axes: axes of a sample's output along which ``i = j`` is summed over.
        diagonal_axes: axes along which only ``i = j`` is computed.
        select: which parameters of a module, as in :func:`jacfunc.module_jacobian`:
            ``"*lora*"`` for those of adapters. With ``batched`` those of a function, as in
            :func:`jacfunc.ggn`.
        outputs: which outputs of every sample, as in :func:`jacfunc.module_jacobian`; a kernel of
            R of them has the axis R in the place of the output's. Those of each sample's own,
            ``[B, …]``, need one batch: of two, and of loaders, give what all samples share, or
            choose by value.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: along the batch, as in :func:`jacfunc.module_jacobian`.
        chunk_size: samples of either side at once; None takes each batch as it is.
        memory: bytes that the call may take, as a number or in words (``"2 GiB"``), with its
            result: as many samples of either side are taken at once as fit. Batches are compared
            before, eight samples at once, which ``independent=True`` skips.
        out: the result of an earlier call, to be overwritten: a loop allocates memory once.
        independent: each sample of a module is taken alone, as a batch of one; True skips,
            ``"always"`` insists on looking whether others change it, as in
            :func:`jacfunc.module_jacobian`. A function of a single sample needs no such look.
        progress: wraps the sequence of blocks, to watch it: ``tqdm.tqdm``, or
            ``rich.progress.track``.
        batched: call a function with batches, as a module is called; it returns the batch in front.
            By default it gets one sample.

    Returns:
        For each output leaf a kernel ``[B1, B2, *diagonal, *out, *out]``, ``out`` being the axes
        of one sample's output that are neither traced nor diagonal.

    Raises:
        TypeError, ValueError: arguments that do not fit, samples that depend on each other.
        NotImplementedError: what torch refuses, a call inside a transform that differentiates, and
            of a module inside any; inside ``vmap``, for ensembles, give a function of a sample.

    Cost:
        An evaluation of each side and M pullbacks onto the outputs of layers; products of factors,
        in whichever order is cheaper. With n chunks a side n evaluations for each of the first.
        With ``memory`` two evaluations of a sample and one of a chunk more for each batch, to see
        what they take.

    Source:
        Novak, Sohl-Dickstein, Schoenholz, "Fast finite width neural tangent kernel" (ICML 2022).

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> jacfunc.ntk(model, None, torch.ones(4, 3)).shape
        torch.Size([4, 4, 2, 2])
        >>> jacfunc.ntk(model, None, torch.ones(4, 3), torch.ones(5, 3), trace_axes=0)[0]
        tensor([8., 8., 8., 8., 8.])
    """
    axes, places = KeptAxes.of(trace_axes, diagonal_axes), Places.of(API, out)
    sides, are_single = named_sides(x1, x2)
    stays = _stays(progress, are_single)
    asked = None if outputs is None else choice_of(API, outputs, are_single and x2 is None)
    func, params = _called(func, params, batched)
    if isinstance(func, nn.Module):
        choices = _selected(params, select), Batching(in_dims, randomness), chunk_size, memory
        how = *choices, independent, chunk_size
        options = BatchOptions.read(API, func, *how, stays=stays, outputs=asked)
        if x2 is None and out is None and not stays:
            kernel = kernel_at_once(options, (positional(x1), {}), axes)
            if kernel is not None:
                return kernel
        budget = Budget(API, options.memory)
        samples_at: SamplesAt = partial(_kept_at, options, budget)
    else:
        budget = _budget_of_function(select, randomness, chunk_size, memory)
        own = {"in_dims": in_dims, "randomness": randomness, "asked": asked}
        samples_at = partial(samples_of, API, func, params, **own)

    with budget.around():
        ranges = in_ranges(sides_of(API, sides, samples_at), axes, chunk_size, budget)
        if out is not None:
            places.check_unread(func, params, x1, x2)
        return product_of(ranges[0], ranges[-1], axes, progress, places)


def gram(func: Callable[..., OutT], argnums: Argnums = 0) -> Callable[..., OutT]:
    """Gramian of ``func``'s Jacobian, from the factors of layers where there are some.

    ``K[*i, *j] = Σₚ J[*i, p] J[*j, p]`` over all entries p of what ``argnums`` names.

    Args:
        func: takes trees, returns a tree of tensors.
        argnums: which positional arguments to differentiate; negative counts from the end.

    Returns:
        A function of the same arguments; for each output leaf a Gramian ``[*out, *out]``.

    Raises:
        TypeError, ValueError: arguments that do not fit. NotImplementedError: what torch refuses,
            and a call inside a transform that differentiates.

    Cost:
        One evaluation, M pullbacks onto the outputs of layers, and products of factors. For the
        samples of a batch :func:`ntk` is cheaper: it knows that they don't depend on each other.

    Example:
        >>> import torch, jacfunc
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> jacfunc.gram(lambda x: A @ x)(torch.ones(2))
        tensor([[ 5., 11.],
                [11., 25.]])
    """
    strategy, new = Structured(), Places.of("gram", None)

    def gram_of(*args: Tree, **kwargs: Any) -> Tree:
        check_uncompiled("gram")
        call = FlatCall(Derivation("gram", func, argnums), args, kwargs)
        whole = [SampleRange(SingleCall(call, strategy), 0, 1)]
        kernels = in_words_of("gram", lambda: product_of(whole, whole, KeptAxes((), ()), None, new))
        return map_tensors(lambda kernel: kernel[0, 0], kernels)

    return named("gram", func, gram_of)


def _called(func: Any, params: Any, batched: bool) -> tuple[Callable[..., Any], Any]:
    """What is called, and its parameters: a function of batches is a module that has its own."""
    check_uncompiled(API)
    if batched is not False:
        check_flags(API, batched=batched)
    if isinstance(func, nn.Module):
        return func, params
    check_called(API, func)
    return (FunctionAsModule(API, func, params), None) if batched else (func, params)


def _kept_at(options: BatchOptions, budget: Budget, args: tuple[Tree, ...]) -> KernelSamples:
    """The samples of a batch, with what is kept of them counted."""
    with budget.keeping():
        return options.at((args, {}))


def _stays(progress: Progress | None, are_single: bool) -> bool:
    """Must the point be copied? Iterables, and progress, may run code that changes it meanwhile."""
    if progress is not None:
        check_progress(API, progress)
    return progress is not None or not are_single


def _budget_of_function(
    select: Select, randomness: object, chunk_size: object, memory: Memory
) -> Budget:
    """The budget for a function; refuses options with a wrong value, or that only modules have."""
    check_chunk_size(API, chunk_size)
    check_randomness_option(API, randomness)
    if select is not None:
        raise ValueError(
            f"{API}: select must be left out for a function, got {select!r}. Give it the "
            "parameters to differentiate by as params, and let it close over the others; or pass "
            "batched=True, if it takes batches."
        )
    return Budget(API, check_memory(API, memory))


def _selected(params: Select, select: Select) -> Select:
    """The selection of a module's parameters, from ``params`` or ``select``, but not from both."""
    if params is not None and select is not None:
        raise ValueError(
            f"{API}: parameters of a module must be selected once, got {params!r} in the second "
            f"place and select={select!r}. Pass None in the second place."
        )
    return params if select is None else select
