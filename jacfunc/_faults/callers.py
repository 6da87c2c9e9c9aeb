"""Derivatives that a function takes itself: told by who calls the operations that are watched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, check_backward_validity

from jacfunc._errors import Refused
from jacfunc._faults.lookups import Args, tensors_of
from jacfunc._torch import inside_transform

FUNCTIONAL = torch.autograd.functional.__name__
_BETWEEN = frozenset(
    {"torch.autograd", "torch.autograd.grad_mode", "torch.overrides", "torch._tensor"}
    | {"torch.utils._contextlib"}
)
_OURS = f"{__name__.partition('.')[0]}."
"""What modules of jacfunc have in front of their names."""


SWITCH: Any = torch._C._set_grad_enabled
BY_CALLER = frozenset({SWITCH, Tensor.detach})
"""What is looked at for who calls it: that does not depend on numbers."""
TAKES_DERIVATIVES: dict[Callable[..., Any], int] = {
    torch.autograd.grad: 4,
    torch.autograd.backward: 3,
    Tensor.backward: 3,
}
"""What a function calls to take derivatives of its own, and where it says ``create_graph``."""
_DERIVED = ("outputs", "tensors", "self")
CUT_OFF = (
    "the function takes a derivative that keeps no graph, which would count as a constant. Pass "
    "create_graph=True to it, or use torch.func"
)
REENTRANT = (
    "checkpoints must not be reentrant, got one that is, whose gradients torch gives to backward() "
    "alone. Pass use_reentrant=False to checkpoint"
)


def require_grad(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Torch refuses it in a transform, where it is needed for derivatives inside alone.

    Those that torch's own code takes would be zero without it.
    """
    wanted = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
    if not wanted or not inside_transform() or f"{asker()}.".startswith("torch."):
        return func(*args, **kwargs)
    return args[0]


def is_checked_for_checkpoint() -> bool:
    """Does a reentrant checkpoint ask of its inputs, of which it warns, whether they are tracked?

    It asks in a generator.
    """
    frame = asking_frame().f_back
    return frame is not None and frame.f_code is check_backward_validity.__code__


def refuse_in_checkpoint(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A reentrant checkpoint switches gradients off, and leaves no trace of what runs inside."""
    if asking_frame().f_code is CheckpointFunction.forward.__code__:
        raise Refused(REENTRANT)
    return func(*args, **kwargs)


def as_it_is(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


def cuts_off(
    func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any], primals: Sequence[Tensor]
) -> bool:
    """Is a derivative taken of what the primals lead to, of which no graph is kept?

    Raises:
        Refused: if ``torch.autograd.functional`` takes it, which returns it without one.
    """
    if func is Tensor.detach:
        frame = asking_frame()
        is_input = module_of(frame) == FUNCTIONAL and frame.f_code.co_name != "_grad_postprocess"
        if is_input and leads_to(tensors_of(args, {}), primals):
            raise Refused(CUT_OFF)
        return False
    place = TAKES_DERIVATIVES[func]
    keeps_graph = kwargs.get("create_graph", args[place] if len(args) > place else False)
    outputs = tensors_of(args[:1], {k: kwargs[k] for k in _DERIVED if k in kwargs})
    if keeps_graph or not leads_to(outputs, primals):
        return False
    if asker() == FUNCTIONAL:
        raise Refused(CUT_OFF)
    return True


def asking_frame() -> Any:
    """Of whoever called the operation: neither a watch nor what torch wraps around it."""
    frame: Any = sys._getframe(1)
    while (module := module_of(frame)) in _BETWEEN or module.startswith(_OURS):
        frame = frame.f_back
    return frame


def module_of(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))


def asker() -> str:
    """The module whose code called the operation."""
    return module_of(asking_frame())


def leads_to(tensors: Iterable[Tensor], ends: Sequence[Tensor]) -> bool:
    """Does a path of the graph lead from one of these tensors to one of the ends?"""
    nodes = {end.grad_fn for end in ends}
    pending: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        if node in nodes:
            return True
        seen.add(node)
        pending += [below for below, _ in node.next_functions]
    return False
