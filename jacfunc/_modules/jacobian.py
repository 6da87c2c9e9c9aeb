"""The door to Jacobians of modules: by parameters, by inputs, or by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from jacfunc._arguments import check_flags
from jacfunc._assembly import read_by, sink_for
from jacfunc._calls import warn_if_followed
from jacfunc._errors import check_uncompiled
from jacfunc._lending import CurrentState, Select
from jacfunc._lock import alone
from jacfunc._modules.independence import Independent
from jacfunc._modules.independent import ModuleResult, call_of, jacobian_of, packed
from jacfunc._modules.inputs import Key, Wrt, argnums_of
from jacfunc._modules.options import ModuleOptions, RowOptions, batching_of, check_module
from jacfunc._modules.settled import SettledCalls
from jacfunc._outputs import Outputs
from jacfunc._planning import compilable, resolve
from jacfunc._showing import named
from jacfunc._types import Memory, Randomness, Tree
from jacfunc.strategies import Strategy

API = "module_jacobian"


class JacobianOptions(RowOptions, total=False):
    """What :func:`module_jacobian` takes by keyword, whatever the form of its result."""

    inputs: Key | Sequence[Key] | None
    per_sample: bool
    dtype: torch.dtype | None
    device: torch.device | str | None
    out: Tree
    strategy: str | Strategy
    create_graph: bool


@overload
def module_jacobian(
    module: nn.Module,
    wrt: Wrt | tuple[Wrt, ...] = "params",
    *,
    flat: Literal[True],
    full_output: Literal[False] = False,
    **options: Unpack[JacobianOptions],
) -> Callable[..., Tensor]: ...
@overload
def module_jacobian(
    module: nn.Module,
    wrt: Wrt | tuple[Wrt, ...] = "params",
    *,
    flat: bool = False,
    full_output: Literal[True],
    **options: Unpack[JacobianOptions],
) -> Callable[..., ModuleResult]: ...
@overload
def module_jacobian(
    module: nn.Module,
    wrt: Wrt | tuple[Wrt, ...] = "params",
    *,
    flat: bool = False,
    full_output: bool = False,
    **options: Unpack[JacobianOptions],
) -> Callable[..., Tree]: ...
@compilable
def module_jacobian(
    module: nn.Module,
    wrt: Wrt | tuple[Wrt, ...] = "params",
    *,
    select: Select = None,
    inputs: Key | Sequence[Key] | None = None,
    outputs: Outputs = None,
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
    """Jacobian of a module: calls it with its parameters as arguments, and differentiates by these.

    ``J[name] = ∂ module(*inputs) / ∂ params[name]``. After each call the module and its inputs are
    as they were before: parameters, gradients, buffers, mode, hooks, plain attributes and the state
    of torch's default generators. All evaluations of a call draw the same numbers from these, and
    from generators that are attributes of the module; those of Python and NumPy move on.

    Args:
        module: any ``nn.Module``, in train or eval mode.
        wrt: what it is differentiated by: ``"params"``, ``"inputs"``, or a tuple of both.
        select: which parameters: a name or a glob (``"encoder.*.weight"``), several of these, a
            predicate of name and parameter, or a dict of tensors by name, which are then the point
            of the derivative. By default all that are trainable. All others are constants.
        inputs: which inputs, by position, by name, or by path (``"batch['image']"``); several give
            a tuple. By default all positional ones or, if there are none, all by keyword.
        outputs: which outputs of a sample, or of a call as a whole; by default all. No other row is
            swept. Numbers as a list, a ``LongTensor`` or a slice, counted through all output
            leaves, the last dimension fastest; a ``LongTensor [B, R]`` where each sample has its
            own; :class:`jacfunc.TopK` or :class:`jacfunc.Sampled`; or cotangents, of which rows
            are sums of rows: ``[R, *out]``, or ``[B, R, *out]`` with each sample's own, as a
            tensor or as a tree like the output.
        per_sample: differentiate each sample of the batch on its own, as a batch of one.
        in_dims: with ``per_sample``, the dimension of samples in the inputs, None for an input that
            all samples share, or prefix trees of these: in a tuple for positional inputs, in a dict
            for inputs by keyword. It is 1 for recurrent layers with the steps in front. Outputs may
            have the samples elsewhere, as states of layers do; in results they come in front.
        flat: return one matrix ``[M, N]``, per sample ``[B, M, N]``, instead of trees of blocks. It
            is written without a copy; :func:`jacfunc.param_slices` names its columns.
        full_output: return a :class:`jacfunc.ModuleResult`: Jacobian, all outputs, and buffers as
            the module would have left them.
        dtype: dtype of the result, which is converted chunk by chunk.
        device: device of the result, which is moved chunk by chunk.
        out: the result of an earlier call, to be overwritten: a loop allocates memory once.
        strategy: as in :func:`jacfunc.jacobian`. ``"looped"`` also takes the samples one by one;
            so do all others where the module runs neither as a batch nor under vmap.
        chunk_size: seeds swept at once, for a strategy given by name.
        memory: bytes that the call may take, with its result, as a number or in words
            (``"2 GiB"``). Seeds, and samples, are taken in chunks that fit.
        randomness: with ``per_sample``, how samples draw from torch's default generators: they must
            not (``"error"``), all draw the ``"same"`` numbers, or each draws ``"different"`` ones.
        create_graph: make the result differentiable in parameters and inputs. By default it is
            detached. Where gradients are on, two signs that a loss uses it all the same are warned
            of: a tensor among the arguments that was computed with gradients; and by ``"inputs"``,
            a module in training whose parameters have changed since the last call. Under
            ``torch.no_grad()`` nothing is warned of.
        independent: with ``per_sample``, when to compare batches to see whether samples depend on
            each other; a module whose samples do is refused. In another batch half of the samples
            are replaced: the rest must have the same outputs and derivatives, to the last bit. None
            compares at the first call of a module or a kind of call, at the second, fourth, eighth,
            …, and at every call that costs much more than the comparison; ``"always"`` compares at
            every call, True at none. Every call is compared, too, where operations may mix samples
            though outputs do not show it. An output of no dimension, such as a loss, is that of the
            sample alone. A module that is made for one sample may return for a batch what it
            returns for one of its samples.

    Returns:
        A function of the module's own inputs, which returns for each output leaf: for ``"params"``
        a dict of blocks ``[*out, *param]`` by name; for ``"inputs"`` blocks in the tree of the
        inputs (of the only one, or a tuple); for both a tuple. Per sample, each block has the batch
        in front, ``[B, *out, *param]``, and ``out`` and inputs are those of one sample; in memory
        rows may come before samples. With ``outputs`` there are R rows in the place of all output
        leaves, ``[R, *param]``.

    Raises:
        TypeError, ValueError: arguments that do not fit, a name that matches nothing, parameters
            of TorchScript, outputs that depend on parameters by a tensor that was computed before
            the call and kept with its graph (kept without, it is a constant). Per sample: samples
            that depend on each other (by batch normalization in train mode, say), or an output
            without a dimension of samples.
        NotImplementedError: what torch refuses, and reentrant checkpoints.

    Cost:
        That of the strategy; per sample one vectorized sweep over the whole batch. To compare
        batches takes up to seven evaluations and twelve pullbacks at the first call of a kind, and
        two of each later. Before the first call one sample is evaluated, to see where outputs hold
        it, and two where that does not tell. Of R outputs R rows are pulled back, each of which
        takes the memory of all outputs; all samples are evaluated once more where outputs are
        chosen by value, and one for cotangents. Parameters that it is not differentiated by are
        copied, up to 64 MiB, until the module is seen only to read them. A later write into one
        raises an error: any write into parameters of 8 KiB together, which is also undone; into
        larger ones a write by an operation of torch, or one that shows in some of their numbers.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> jac = jacfunc.module_jacobian(model, per_sample=True)(torch.ones(5, 3))
        >>> {name: tuple(block.shape) for name, block in jac.items()}
        {'weight': (5, 2, 2, 3), 'bias': (5, 2, 2)}
        >>> jacfunc.module_jacobian(model, per_sample=True, flat=True)(torch.ones(5, 3)).shape
        torch.Size([5, 2, 8])
        >>> labels = torch.tensor([[1], [0], [0], [1], [1]])  # one row for each sample
        >>> jac = jacfunc.module_jacobian(model, per_sample=True, outputs=labels)
        >>> jac(torch.ones(5, 3))["bias"][:, 0]
        tensor([[0., 1.],
                [1., 0.],
                [1., 0.],
                [0., 1.],
                [0., 1.]])
    """
    check_flags(API, per_sample=per_sample, flat=flat, full_output=full_output)
    check_flags(API, create_graph=create_graph)
    batching = batching_of(API, per_sample, in_dims, randomness)
    choices = API, module, select, batching, chunk_size, memory, independent
    options = ModuleOptions.read(*choices, outputs=outputs)
    argnums, chosen = argnums_of(API, wrt), resolve(API, strategy, chunk_size, memory)
    called = partial(call_of, options, argnums, inputs, full_output, create_graph)
    beside = dtype, device, out, full_output, create_graph
    settled = SettledCalls.of(options, argnums, inputs, chosen, flat, beside)

    def module_jacobian_of(*args: Tree, **kwargs: Any) -> Tree:
        check_uncompiled(API)
        arguments = args, kwargs
        with alone():
            state = options.current.found()
            if not create_graph:
                warn_if_followed(API, module, state.point, arguments, wrt != "params")
            if settled and (rows := settled.jacobian(state, arguments)) is not None:
                return rows
            sink = sink_for(API, out, flat, dtype, device, partial(read_by, module, arguments))
            result = jacobian_of(called(state, arguments), chosen, sink, batching, settled)
        return packed(result, flat, full_output)

    return named("module_jacobian", module, module_jacobian_of)


def param_slices(module: nn.Module, select: Select = None) -> dict[str, slice]:
    """The columns of a flat Jacobian that belong to each parameter, by name.

    Args:
        module: any ``nn.Module``.
        select: which parameters, as in :func:`jacfunc.module_jacobian`.

    Returns:
        A slice for each parameter, in the order of ``named_parameters()``; together they are all
        columns.

    Raises:
        ValueError: a name that matches nothing.

    Example:
        >>> import torch, jacfunc
        >>> jacfunc.param_slices(torch.nn.Linear(3, 2))
        {'weight': slice(0, 6, None), 'bias': slice(6, 8, None)}
    """
    check_uncompiled("param_slices", "Call it before.")
    check_module("param_slices", module)
    slices, start = {}, 0
    for name, param in CurrentState("param_slices", module, select).now().point.items():
        slices[name] = slice(start, start + param.numel())
        start += param.numel()
    return slices
