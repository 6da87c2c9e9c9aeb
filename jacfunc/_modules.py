"""The door to whole modules: Jacobians by parameter name, by input, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from jacfunc._derive import jacobian_by
from jacfunc._functorch import inside_derivative
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
    gradients, buffers, mode, hooks and the random state.

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
            ``"different"`` masks.
        create_graph: keep the graph, so that the result is differentiable in parameters and
            inputs. By default it is detached.

    Returns:
        A function of the module's own inputs. For each output leaf: a dict of blocks
        ``[*out, *param]`` by name for ``"params"``; the tree of the inputs (of the only one, or
        the tuple) for ``"inputs"``; a tuple of these for a tuple. Per sample each block has the
        batch in front: ``[B, *out, *param]``, ``out`` and inputs being those of one sample.

    Raises:
        TypeError, ValueError: arguments that do not fit, a name that matches nothing, batch
            normalization in train mode per sample (it couples the samples).
        NotImplementedError: what torch refuses.

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
    argnums = _argnums(wrt)
    chosen = resolve(API, strategy, chunk_size, memory)
    call = _caller(module, per_sample)
    if per_sample:
        derive = each_sample(API, call, argnums, chosen, randomness)
    else:
        derive = jacobian_by(API, call, argnums, chosen, has_aux=False)

    def module_jacobian_of(*inputs: Tree, **kwargs: Any) -> Tree:
        _check_call(module, per_sample, create_graph)
        state = ModuleState.of(API, module, select)
        params = state.chosen
        point = inputs[0] if len(inputs) == 1 else inputs
        with (
            torch.random.fork_rng(devices=_cuda_devices(params.values())),
            torch.set_grad_enabled(create_graph and torch.is_grad_enabled()),
        ):
            return derive(params, point, kwargs, Setting(state, len(inputs) == 1))

    return module_jacobian_of


@dataclass(frozen=True)
class Setting:
    """What does not change from sample to sample, nor is differentiated."""

    state: ModuleState
    is_single: bool  # one positional input, which then stands for itself


def _caller(module: nn.Module, per_sample: bool) -> Callable[..., Tree]:
    """The module as a function of chosen parameters and inputs; everything else is constant."""

    def call(params: dict[str, Tensor], point: Tree, kwargs: Tree, setting: Setting) -> Tree:
        inputs = (point,) if setting.is_single else point
        if per_sample:
            inputs, kwargs = map_tensors(lambda x: x.unsqueeze(0), (inputs, kwargs))
        tensors = setting.state.tensors(params)
        # neither strict nor tied by torch, which is slow: these are all names of the module
        output = functional_call(module, tensors, inputs, kwargs, tie_weights=False)
        return map_tensors(lambda x: x.squeeze(0), output) if per_sample else output

    return call


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


def _check_call(module: nn.Module, per_sample: bool, create_graph: bool) -> None:
    if not create_graph and inside_derivative():
        raise ValueError(
            f"{API}: inside another derivative the result must keep its graph, got "
            "create_graph=False, whose derivative would be zero. Pass create_graph=True."
        )
    if not per_sample:
        return
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and (part.training or not part.track_running_stats):
            raise ValueError(
                f"{API}: per_sample needs samples that do not depend on each other, got batch "
                f"normalization over the batch in {name or 'the module'}. "
                "Call module.eval(), or leave per_sample out."
            )


def _cuda_devices(params: Iterable[Tensor]) -> list[int]:
    return sorted({p.device.index for p in params if p.device.type == "cuda"})
