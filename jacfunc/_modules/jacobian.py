"""The door to whole modules: Jacobians by parameter name, by input, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jacfunc._assembly import sink_for
from jacfunc._lending import CurrentState, ModuleState, Select
from jacfunc._lock import alone
from jacfunc._modules.call import Batching, ModuleCall, Wrt, argnums_of
from jacfunc._modules.checks import check_module
from jacfunc._modules.independence import FEW_CALLS, Independence, Independent
from jacfunc._modules.inputs import InputChoice, Key
from jacfunc._planning import resolve
from jacfunc._types import Memory, Randomness, Tree
from jacfunc.strategies import Strategy

API = "module_jacobian"


class ModuleResult(NamedTuple):
    """What ``module_jacobian(..., full_output=True)`` gives, all of it from one evaluation.

    Args:
        jacobian: as without ``full_output``.
        outputs: what the module returned.
        buffers: as the module would have left them, by name; per sample with the batch in front.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.BatchNorm1d(2, affine=False)
        >>> found = jacfunc.module_jacobian(model, "inputs", full_output=True)(torch.eye(2))
        >>> found.jacobian.shape, found.outputs.shape, found.buffers["running_mean"]
        (torch.Size([2, 2, 2, 2]), torch.Size([2, 2]), tensor([0.0500, 0.0500]))
    """

    jacobian: Tree
    outputs: Tree
    buffers: dict[str, Tensor]


def module_jacobian(
    module: nn.Module,
    wrt: Wrt | tuple[Wrt, ...] = "params",
    *,
    select: Select = None,
    inputs: Key | Sequence[Key] | None = None,
    per_sample: bool = False,
    in_dims: Tree = 0,
    flat: bool = False,
    full_output: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tree = None,
    strategy: str | Strategy = "auto",
    chunk_size: int | None = None,
    memory: Memory = None,
    randomness: Randomness = "error",
    create_graph: bool = False,
    independent: Independent = None,
) -> Callable[..., Any]:
    """Jacobians of a whole module: calls it with its parameters as arguments and differentiates.

    ``J[name] = ∂ module(*inputs) / ∂ params[name]``. The module is left as it was: parameters,
    gradients, buffers, mode, hooks, plain attributes and the random state; so are its inputs. All
    evaluations draw the same numbers from torch's generators, be they its default ones or
    attributes of the module; those of Python and NumPy go on.

    Args:
        module: any ``nn.Module``, in train or eval mode.
        wrt: ``"params"``, ``"inputs"``, or a tuple of both.
        select: parameters by name or glob (``"encoder.*.weight"``), several of these, a predicate
            of name and parameter, or a dict of tensors by name, at which it then differentiates;
            all that are trainable by default. The others are constants.
        inputs: inputs by position, by name, or by path (``"batch['image']"``); several give a
            tuple. By default all that are positional or, if there are none, all by keyword.
        per_sample: each sample of the batch is differentiated on its own.
        in_dims: where inputs have the batch, if ``per_sample``: a dimension, None for what all
            samples share, or prefix trees of these, in a tuple for positional inputs, in a dict
            for those by keyword.
        flat: one matrix ``[M, N]``, per sample ``[B, M, N]``, instead of trees of blocks, written
            without a copy; :func:`jacfunc.param_slices` names its columns.
        full_output: return a :class:`jacfunc.ModuleResult`: Jacobian, outputs, and the buffers as
            the module would have left them.
        dtype: of the result, into which it is converted chunk by chunk.
        device: of the result, to which it is moved chunk by chunk.
        out: the result of an earlier call, to write this one into: a loop pays for memory once.
        strategy: as in :func:`jacfunc.jacobian`; ``"looped"`` takes samples one by one too, and
            so does ``"auto"`` where the module does not run under vmap.
        chunk_size: seeds swept at once, for a strategy given by name.
        memory: bytes that the call may take, its result among them, as a number or in words
            (``"2 GiB"``); seeds, and samples, go in chunks that keep to it.
        randomness: of random layers along the batch of ``per_sample``: ``"error"``, ``"same"`` or
            ``"different"`` masks, however the samples are taken. It is about torch's default
            generators.
        create_graph: keep the graph, so that the result is differentiable in parameters and
            inputs. By default it is detached.
        independent: ``per_sample`` means each sample alone, as a batch of one. A module whose
            samples depend on each other is refused: another batch, in which half of the samples
            are others, must give the rest the same outputs and derivatives to the last bit. It is
            looked at when the module or the kind of call is new, at the second, fourth, eighth, …
            call, and at all calls beside which it costs little; ``"always"`` looks at every call,
            True at none. What only global state switches on is seen when it is looked again. An
            output of no dimension, such as a loss, is that of the sample alone. A module that is
            made for one sample may return for a batch what it returns for one of its samples.

    Returns:
        A function of the module's own inputs. For each output leaf: a dict of blocks
        ``[*out, *param]`` by name for ``"params"``; the tree of the inputs (of the only one, or
        the tuple) for ``"inputs"``; a tuple of these for a tuple. Per sample each block has the
        batch in front: ``[B, *out, *param]``, ``out`` and inputs being those of one sample.

    Raises:
        TypeError, ValueError: arguments that do not fit, a name that matches nothing, parameters
            of TorchScript, outputs that depend on parameters by what was computed before the call
            and kept with its graph (kept without, it is a constant); per sample a module that
            couples the samples (batch normalization in train mode, say), or an output without the
            batch in front.
        NotImplementedError: what torch refuses, and reentrant checkpoints.

    Cost:
        That of the strategy; per sample one vectorized sweep over the whole batch. To see
        whether samples depend on each other takes up to seven evaluations and twelve pullbacks of
        the batch at the first call of a kind, later two and two.
        Parameters that it is not differentiated by are copied until the module is seen to read
        them alone, up to 64 MiB. A later write is undone and refused: by any way in parameters of
        8 KiB together, of larger ones it is told if it is torch's own, or shows in some numbers.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> jac = jacfunc.module_jacobian(model, per_sample=True)(torch.ones(5, 3))
        >>> {name: tuple(block.shape) for name, block in jac.items()}
        {'weight': (5, 2, 2, 3), 'bias': (5, 2, 2)}
        >>> jacfunc.module_jacobian(model, per_sample=True, flat=True)(torch.ones(5, 3)).shape
        torch.Size([5, 2, 8])
    """
    check_module(API, module)
    argnums, current = argnums_of(API, wrt), CurrentState(API, module, select)
    sweeps = resolve(API, strategy, chunk_size, memory)
    independence = Independence.of(API, independent, None if memory is None else FEW_CALLS)
    batching = Batching(in_dims, randomness) if per_sample else None

    def module_jacobian_of(*args: Tree, **kwargs: Any) -> Tree:
        arguments = args, kwargs
        with alone():
            state = current.now()
            choice = InputChoice.of(API, module, inputs, arguments)
            sink = sink_for(API, out, flat, dtype, device)
            call = ModuleCall(
                API, state, arguments, argnums, choice, full_output, create_graph, independence
            )
            result = call.jacobian(sweeps, sink, batching)
        jacobian = result.blocks[0][0] if flat else result.jacobian()
        return ModuleResult(jacobian, *result.value_and_aux()) if full_output else jacobian

    return module_jacobian_of


def param_slices(module: nn.Module, select: Select = None) -> dict[str, slice]:
    """Columns of a flat Jacobian by parameter name, in the order of ``named_parameters()``.

    Args:
        module: any ``nn.Module``.
        select: as in :func:`jacfunc.module_jacobian`.

    Returns:
        The slice of each parameter's entries; together they are all columns.

    Raises:
        ValueError: a name that matches nothing.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.param_slices(torch.nn.Linear(3, 2))
        {'weight': slice(0, 6, None), 'bias': slice(6, 8, None)}
    """
    check_module("param_slices", module)
    slices, start = {}, 0
    with alone():
        point = ModuleState.of("param_slices", module, select).point
    for name, param in point.items():
        slices[name] = slice(start, start + param.numel())
        start += param.numel()
    return slices
