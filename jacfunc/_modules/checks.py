"""Checks of a module and of a call of it, before anything is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from jacfunc._lending import ModuleState
from jacfunc._remembered import Remembered
from jacfunc._torch import inside_derivative
from jacfunc._trees import flatten
from jacfunc._types import Tree, is_differentiable

StateCheck: TypeAlias = Callable[[str, ModuleState], None]


@cache
def _passed() -> Remembered[bool]:
    """The states that a check has passed."""
    return Remembered()


def _once_for_a_state(check: StateCheck) -> StateCheck:
    """The check, which is not made again of a state that has passed it: states do not change."""

    @wraps(check)
    def once(api: str, state: ModuleState) -> None:
        if not _passed().get(state, check):
            check(api, state)
            _passed().put(state, check, True)

    return once


def check_module(api: str, module: object) -> None:
    """Refuse what is no module: functions have doors of their own."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{api}: module must be an nn.Module, got {type(module).__name__}. "
            "For a function use jacfunc.jacobian."
        )


def check_call(api: str, create_graph: bool) -> None:
    """Refuse a detached result inside another derivative."""
    if not create_graph and inside_derivative():
        raise ValueError(
            f"{api}: inside another derivative the result must keep its graph, got "
            "create_graph=False, whose derivative would be zero. Pass create_graph=True."
        )


@_once_for_a_state
def check_devices(api: str, state: ModuleState) -> None:
    """Refuse modules on several devices."""
    for name, part in state.parts.items():
        module = part.module
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"{api}: a module must run on one device, got DataParallel over "
                f"{len(module.device_ids)} in {name or 'the module'}. Pass module.module instead."
            )


def check_module_inputs(api: str, inputs: Tree) -> None:
    """Refuse inputs to differentiate by of which none is differentiable."""
    leaves = flatten(inputs)[0]
    if leaves and not any(map(is_differentiable, leaves)):
        kinds = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves})
        raise TypeError(
            f"{api}: with wrt='inputs' these must hold at least one floating point tensor to "
            f"differentiate, got {', '.join(kinds)}. Pass wrt='params', or floating point inputs."
        )


@_once_for_a_state
def check_parameters(api: str, state: ModuleState) -> None:
    """Refuse chosen parameters of TorchScript, whose compiled code may take them for constants."""
    for part in state.parts.values():
        if part.is_scripted:
            own = {id(param) for param in part.params.values()}
            if name := next((n for n in state.point if id(state.params[n]) in own), None):
                raise ValueError(
                    f"{api}: parameters must be those of Python modules, got {name} of "
                    "TorchScript. Pass wrt='inputs', or the module that it was made from."
                )


def check_samples(api: str, state: ModuleState) -> None:
    """Refuse modules whose samples are known to depend on each other, or not to lie in front."""
    _check_norms(api, state)
    if getattr(state.parts[""].module, "batch_first", True) is False:
        raise ValueError(
            f"{api}: per_sample needs a module with the batch in front, got batch_first=False. "
            "Use batch_first=True, or leave per_sample out."
        )


@_once_for_a_state
def _check_norms(api: str, state: ModuleState) -> None:
    """Refuse batch normalization over the batch."""
    for name, part in state.parts.items():
        module = part.module
        scripted = str(module.original_name) if part.is_scripted else ""
        is_norm = isinstance(module, _BatchNorm) or "BatchNorm" in scripted
        if is_norm and (module.training or part.buffers.get("running_mean") is None):
            raise ValueError(
                f"{api}: per_sample needs samples that do not depend on each other, got batch "
                f"normalization over the batch in {name or 'the module'}. "
                "Call module.eval(), or leave per_sample out."
            )
