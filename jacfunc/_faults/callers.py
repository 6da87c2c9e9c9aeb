"""Finds out which code called a watched operation: so derivatives a function takes are seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, check_backward_validity

from jacfunc._errors import Refused
from jacfunc._faults.lookups import Args, tensors_of
from jacfunc._torch import (
    Pull,
    constant,
    has_tangent,
    inside_transform,
    is_pushing,
    is_tracked,
    nodes_behind,
)
from jacfunc._trees import map_tensors
from jacfunc._types import is_differentiable

FUNCTIONAL = torch.autograd.functional.__name__
_BETWEEN = frozenset(
    {"torch.autograd", "torch.autograd.grad_mode", "torch.overrides", "torch._tensor"}
    | {"torch.utils._contextlib", nn.Module.__module__}
)
_OURS = f"{__name__.partition('.')[0]}."
"""What modules of jacfunc have in front of their names."""


SWITCH: Any = torch._C._set_grad_enabled
BY_CALLER = frozenset({SWITCH, Tensor.detach})
"""Operations that matter for who calls them, which does not depend on numbers."""
TAKES_DERIVATIVES: dict[Callable[..., Any], int] = {
    torch.autograd.grad: 4,
    torch.autograd.backward: 3,
    Tensor.backward: 3,
}
"""How a function takes derivatives itself, and the position of the argument ``create_graph``."""
WAYS_OUT: frozenset[Callable[..., Any]] = frozenset(
    {
        Tensor.numpy,
        Tensor.__array__,
        Tensor.item,
        Tensor.tolist,
        Tensor.__float__,
        Tensor.__dlpack__,
    }
)
"""Operations that hand numbers of a tensor to other code than torch."""
_BY_TENSORS = "__bool__", "__int__", "__index__", "__complex__", "__contains__", "__format__"
_BY_NAME = (
    *("is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select"),
    *("unique", "unique_consecutive"),
)
READING: frozenset[Callable[..., Any]] = frozenset(
    [getattr(Tensor, name) for name in (*_BY_TENSORS, *_BY_NAME, "__repr__")]
    + [getattr(torch, name) for name in _BY_NAME]
)
"""Operations by which numbers say what Python does next, as truth or as a size.

At other numbers a function that calls one may call other operations than it has shown.
"""
_DERIVED = ("outputs", "tensors", "self")
_COTANGENTS = ("grad_outputs", "grad_tensors", "gradient")
CUT_OFF = (
    "the function takes a derivative that keeps no graph, which would count as a constant. Pass "
    "create_graph=True to it, or use torch.func"
)
REENTRANT = (
    "checkpoints must not be reentrant, got one that is, whose gradients torch gives to backward() "
    "alone. Pass use_reentrant=False to checkpoint"
)


def require_grad(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """``Tensor.requires_grad_``, which does nothing if user code calls it in a transform.

    Torch would refuse it there, and only derivatives inside the function need it. Torch's own code
    must run it: its derivatives would be zero.
    """
    is_on = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
    if not is_on or not inside_transform() or f"{asker()}.".startswith("torch."):
        return func(*args, **kwargs)
    return args[0]


@dataclass(slots=True)
class Frozen:
    """Tensors that a function has told to require no gradient, for a while; by identity.

    Torch lets leaves alone be told so, and a module's parameters are none while it is lent.
    Adapters of language models are switched off so inside a call. Meanwhile operations get such a
    tensor as a constant.
    """

    tensors: dict[int, Tensor] = field(default_factory=dict)

    def has(self, tensor: Tensor) -> bool:
        """Is it frozen?"""
        return id(tensor) in self.tensors

    def switches(self, args: Args, kwargs: Mapping[str, Any]) -> bool:
        """Take in a call of ``requires_grad_``; False if torch's own must do what it says."""
        tensor = args[0]
        if kwargs.get("requires_grad", args[1] if len(args) > 1 else True):
            return self.tensors.pop(id(tensor), None) is not None
        if is_tracked(tensor) and (inside_transform() or not tensor.is_leaf):
            self.tensors[id(tensor)] = tensor
            return True
        return inside_transform()

    def made_constant(self, arguments: Any) -> Any:
        """The arguments of an operation, with constants in the place of these tensors."""

        def as_constant(x: Tensor) -> Tensor:
            if not self.has(x):
                return x
            return constant(x) if is_pushing() else x.detach()

        return map_tensors(as_constant, arguments)


def without_tangent(result: Any, name: str, args: Args, level: int) -> Any:
    """What an operation returned, without tangents: under torch.no_grad() it is a constant.

    Args:
        name: of the operation.
        level: of forward mode.
    """
    writes = name == "setitem__" or (name.endswith("_") and not name.endswith("__"))
    # a reverse level inside has a graph of the result, which a constant would not have
    held = args[:1] if writes else (result,) if torch.is_grad_enabled() else ()
    if any(has_tangent(x, level) for x in tensors_of(held, {}) if is_differentiable(x)):
        raise Refused(f"torch's forward mode goes on through torch.no_grad(), here through {name}")
    return map_tensors(lambda x: constant(x, level) if is_differentiable(x) else x, result)


def is_checked_for_checkpoint() -> bool:
    """Does a reentrant checkpoint read ``requires_grad`` of its inputs, to warn about them?

    It reads them in a generator, so the frame is that of the generator's caller.
    """
    frame = asking_frame().f_back
    return frame is not None and frame.f_code is check_backward_validity.__code__


def refuse_in_checkpoint(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A switch of grad mode; refused from a reentrant checkpoint, inside which no graph is made.

    Raises:
        Refused: if a reentrant checkpoint calls it.
    """
    if asking_frame().f_code is CheckpointFunction.forward.__code__:
        raise Refused(REENTRANT)
    return func(*args, **kwargs)


def as_it_is(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """The call itself, for operations that are only noted."""
    return func(*args, **kwargs)


def cuts_off(
    func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any], primals: Sequence[Tensor]
) -> bool:
    """Does the call take a derivative of something that depends on the primals, without a graph?

    So does a backward pass of somebody's own that runs a function again and takes its gradient, as
    adjoint solvers do, while it is itself differentiated.

    Raises:
        Refused: if the result never has a graph, as that of ``torch.autograd.functional``, or lacks
            one though cotangents depend on the primals, in which it is linear.
    """
    if func is Tensor.detach:
        frame = asking_frame()
        is_input = module_of(frame) == FUNCTIONAL and frame.f_code.co_name != "_grad_postprocess"
        if is_input and leads_to([args[0].grad_fn], primals):
            raise Refused(CUT_OFF)
        return False
    place = TAKES_DERIVATIVES[func]
    keeps_graph = kwargs.get("create_graph", args[place] if len(args) > place else False)
    if keeps_graph:
        return False
    outputs = tensors_of(args[:1], {k: kwargs[k] for k in _DERIVED if k in kwargs})
    node = Pull.running_node()
    if node is None or not leads_to([node], primals):
        if not leads_to([out.grad_fn for out in outputs], primals):
            return False
        is_lost = asker() == FUNCTIONAL
    else:
        own = {k: kwargs[k] for k in _COTANGENTS if k in kwargs}
        cotangents = tensors_of(args[place - 2 : place - 1], own)
        is_lost = leads_to([cotangent.grad_fn for cotangent in cotangents], primals)
    if is_lost:
        raise Refused(CUT_OFF)
    return True


def asking_frame() -> Any:
    """The frame that called the operation, without those of jacfunc and of torch's wrappers."""
    frame: Any = sys._getframe(1)
    while (module := module_of(frame)) in _BETWEEN or module.startswith(_OURS):
        frame = frame.f_back
    return frame


def module_of(frame: Any) -> str:
    """The name of the module whose code the frame runs."""
    return str(frame.f_globals.get("__name__", ""))


def asker() -> str:
    """The name of the module whose code called the operation."""
    return module_of(asking_frame())


def leads_to(starts: Iterable[Any], ends: Sequence[Tensor]) -> bool:
    """Does a path of the graph lead from one of these nodes to one of the ends?"""
    nodes = {end.grad_fn for end in ends}
    return any(node in nodes for node in nodes_behind(starts))
