"""The door to whole modules: Jacobians by parameter name, by input, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jacfunc._check import is_differentiable
from jacfunc._derive import jacobian_by
from jacfunc._functorch import is_pushing
from jacfunc._module_checks import (
    check_call,
    check_inputs,
    check_parameters,
    check_samples,
    reentrant_checkpoints_refused,
)
from jacfunc._parameters import ModuleState
from jacfunc._resolve import Memory, resolve
from jacfunc._samples import each_sample
from jacfunc._tree import map_tensors
from jacfunc._types import Tree
from jacfunc.strategies import Strategy
from jacfunc.strategies._forward import Randomness

API = "module_jacobian"
Wrt = Literal["params", "inputs"]
_POSITIONS = {"params": 0, "inputs": 1}


def module_jacobian(
    module: nn.Module,
    wrt: Wrt | tuple[Wrt, ...] = "params",
    *,
    select: str | Sequence[str] | None = None,
    per_sample: bool = False,
    strategy: str | Strategy = "auto",
    chunk_size: int | None = None,
    memory: Memory = None,
    randomness: Randomness = "error",
    create_graph: bool = False,
) -> Callable[..., Any]:
    """Jacobians of a whole module: calls it with its parameters as arguments and differentiates.

    ``J[name] = ∂ module(*inputs) / ∂ params[name]``. The module is left as it was: parameters,
    gradients, buffers, mode, hooks, plain attributes and the random state; so are its inputs. All
    evaluations draw the same numbers from torch's generators, be they its default ones or
    attributes of the module; those of Python and NumPy go on.

    Args:
        module: any ``nn.Module``, in train or eval mode.
        wrt: ``"params"``, ``"inputs"``, or a tuple of both.
        select: names or globs (``"encoder.*.weight"``) of the parameters; all by default. Frozen
            parameters are constants.
        per_sample: every tensor among the inputs has the batch in front, and each sample is
            differentiated on its own.
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

    Returns:
        A function of the module's own inputs. For each output leaf: a dict of blocks
        ``[*out, *param]`` by name for ``"params"``; the tree of the inputs (of the only one, or
        the tuple) for ``"inputs"``; a tuple of these for a tuple. Per sample each block has the
        batch in front: ``[B, *out, *param]``, ``out`` and inputs being those of one sample.

    Raises:
        TypeError, ValueError: arguments that do not fit, a name that matches nothing, parameters
            of TorchScript; per sample batch normalization in train mode (it couples the samples),
            or an output without the batch in front.
        NotImplementedError: what torch refuses, and reentrant checkpoints.

    Cost:
        That of the strategy; per sample one vectorized sweep over the whole batch.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 2)
        >>> jac = jacfunc.module_jacobian(model, per_sample=True)(torch.ones(5, 3))
        >>> {name: tuple(block.shape) for name, block in jac.items()}
        {'weight': (5, 2, 2, 3), 'bias': (5, 2, 2)}
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{API}: module must be an nn.Module, got {type(module).__name__}. "
            "For a function use jacfunc.jacobian."
        )
    argnums, by_inputs = _argnums(wrt), "inputs" in wrt
    chosen = resolve(API, strategy, chunk_size, memory)
    call = _caller(module, by_inputs, per_sample)
    if per_sample:
        derive = each_sample(API, call, argnums, chosen, randomness)
    else:
        derive = jacobian_by(API, call, argnums, chosen, has_aux=False)

    def module_jacobian_of(*inputs: Tree, **kwargs: Any) -> Tree:
        state = ModuleState.of(API, module, select)
        point = inputs[0] if len(inputs) == 1 else inputs
        check_call(API, state, create_graph)
        if by_inputs:
            check_inputs(API, point)
        if "params" in wrt:
            check_parameters(API, state)
        if per_sample:
            check_samples(API, state)
        with (
            torch.random.fork_rng(devices=_cuda_devices(state)),
            torch.set_grad_enabled(create_graph and torch.is_grad_enabled()),
            # checkpoints and hooks run parts of the module in the sweeps, too
            state.lent(state.chosen),
            reentrant_checkpoints_refused(API),
        ):
            return derive(state.chosen, point, kwargs, Setting(state, len(inputs) == 1))

    return module_jacobian_of


@dataclass(frozen=True)
class Setting:
    """What does not change from sample to sample, nor is differentiated."""

    state: ModuleState
    is_single: bool  # one positional input, which then stands for itself


def _caller(module: nn.Module, by_inputs: bool, per_sample: bool) -> Callable[..., Tree]:
    """The module as a function of chosen parameters and inputs; everything else is constant."""

    def given(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if per_sample else x

    def copied(x: Tensor) -> Tensor:
        """A constant, which the module may write into."""
        return given(x.clone())

    def differentiated(x: Tensor) -> Tensor:
        return given(x) if is_differentiable(x) else copied(x)

    def call(params: dict[str, Tensor], point: Tree, kwargs: Tree, setting: Setting) -> Tree:
        point = map_tensors(differentiated if by_inputs else copied, point)
        kwargs = map_tensors(copied, kwargs) if kwargs else kwargs
        if is_pushing():
            setting.state.check_forward()
        with setting.state.lent(params):
            output = module(point, **kwargs) if setting.is_single else module(*point, **kwargs)
            return map_tensors(_of_one, output) if per_sample else output

    return call


def _of_one(output: Tensor) -> Tensor:
    """An output of one sample; the loss of a batch has no batch in front."""
    if output.dim() and output.shape[0] != 1:
        raise ValueError(
            f"{API}: per_sample needs every output to have the batch in front, got shape "
            f"{tuple(output.shape)} for a batch of one. Use a module that transposes it, or that "
            "returns other outputs alone."
        )
    return output.squeeze(0)


def _argnums(wrt: Any) -> int | tuple[int, ...]:
    """Positions among ``(params, inputs)``."""
    wanted = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    if not wanted or any(w not in _POSITIONS for w in wanted) or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"{API}: wrt must be 'params', 'inputs' or a tuple of both, got {wrt!r}. "
            "Choose single parameters with select=."
        )
    positions = tuple(_POSITIONS[w] for w in wanted)
    return positions[0] if isinstance(wrt, str) else positions


def _cuda_devices(state: ModuleState) -> list[int]:
    tensors = (*state.chosen.values(), *state.params.values(), *state.buffers.values())
    return sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
