"""Tells which of functorch's transforms are active, and which of them wrap a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import (
    _functorch,
    _get_dispatch_mode,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _TorchDispatchModeKey,
)
from torch._C._functorch import TransformType
from torch._functorch import eager_transforms, pyfunctorch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from jacfunc._lock import holds_alone
from jacfunc._types import Leaves


class Transform(NamedTuple):
    """An active transform of functorch; what it does to tensors, if it is a vmap."""

    kind: TransformType
    number: int

    def of_all(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensor with the samples in a dimension, of size 1 if all samples share it."""
        is_mapped = _functorch.is_batchedtensor(tensor)
        if not is_mapped or _functorch.maybe_get_level(tensor) != self.number:
            return tensor.unsqueeze(dim)
        at = _functorch.maybe_get_bdim(tensor)
        values: Tensor = _functorch.get_unwrapped(tensor)
        return values if at == dim else values.movedim(at, dim)

    def of_one(self, values: Tensor, dim: int) -> Tensor:
        """What :meth:`of_all` returns, as a tensor of one sample."""
        if values.shape[dim] == 1:
            return values.select(dim, 0)
        return _functorch._add_batch_dim(values, dim, self.number)

    def is_next(self, tensors: Iterable[Tensor]) -> bool:
        """Is it still the innermost, and does no vmap map any of the tensors?"""
        return _functorch.maybe_current_level() == self.number and not any(
            map(_functorch.is_batchedtensor, tensors)
        )

    def below(self, func: Callable[..., Any], *args: Any) -> Any:
        """``func(*args)``, of tensors of all samples: the transform does not see it."""
        around = _functorch.pop_dynamic_layer_stack()
        try:
            return func(*args)
        finally:
            _functorch.push_dynamic_layer_stack(around)


def innermost() -> Transform | None:
    """The transform that sees operations first."""
    top = _functorch.peek_interpreter_stack()
    return None if top is None else Transform(top.key(), top.level())


def inside_transform() -> bool:
    """Is a functorch transform or plain forward mode active? Only functorch can nest in these."""
    return _functorch.peek_interpreter_stack() is not None or is_pushing()


def is_outermost() -> bool:
    """Is neither a transform nor a compiler active? Then plain graphs can be read."""
    return not (
        _functorch.peek_interpreter_stack() is not None
        or is_pushing()
        or torch.compiler.is_compiling()
    )


def makes_plain_tensors() -> bool:
    """Is a tensor that is made now a plain one, which may be used at any time later?"""
    return (
        is_outermost() and not _len_torch_dispatch_stack() and not torch.is_inference_mode_enabled()
    )


def is_traced() -> bool:
    """Does ``make_fx`` record what is computed now? Then no number may be read."""
    return bool(
        _len_torch_dispatch_stack() and _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
    )


def is_undisturbed() -> bool:
    """Does nobody look at what torch does, so that what was compiled may stand in?"""
    if not is_recorded_plainly():
        return False  # a compiler can't trace what follows
    return not (_len_torch_function_stack() or torch.is_anomaly_enabled())


def is_recorded_plainly() -> bool:
    """Is no transform, dispatch mode, compiler or hook on what is saved for backward active?

    Function modes may be.
    """
    return not (
        _functorch.peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch.compiler.is_compiling()
    )


@contextmanager
def outside_transforms() -> Iterator[None]:
    """A context without the transforms and dispatch modes that are active outside."""
    with pyfunctorch.temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


NOTHING = nullcontext()
"""A context that does nothing."""


def memory_of(tensor: Tensor) -> int:
    """A number of the tensor's storage: equal for tensors that share their memory."""
    return memories_of((tensor,))[0]


def memories_of(tensors: Iterable[Tensor]) -> list[int]:
    """A number for the storage of each tensor, see :func:`memory_of`."""
    if torch.compiler.is_compiling():  # compiled code is functional: nothing is written
        return [*map(id, tensors)]
    plain = [*map(below_transforms, tensors)]
    with torch._C.DisableTorchFunction():  # or it would count as a read by the user's function
        return [int(x.untyped_storage()._cdata) for x in plain]


def levels() -> tuple[object, ...]:
    """The active transforms, to tell one situation from another."""
    return (*active(), is_pushing())


def newer_transforms(number: int) -> list[str]:
    """Names of the active transforms without the outermost ``number``: Vmap, Grad, Jvp, …"""
    return [key.name for key in active()[number:]]


def is_batched(tensor: Tensor) -> bool:
    """Do the values of the tensor, not its tangent alone, differ along a vmap outside?"""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def num_vmap_levels() -> int:
    """How many vmaps are active."""
    return sum(key == TransformType.Vmap for key in active())


def inside_derivative() -> bool:
    """Is forward mode or a reverse level of functorch active?"""
    return is_pushing() or TransformType.Grad in active()


def active() -> list[TransformType]:
    """The active transforms, outermost first."""
    if torch.compiler.is_compiling():
        return []
    stack = _functorch.get_interpreter_stack()
    return [interpreter.key() for interpreter in stack] if stack else []


def is_pushing() -> bool:
    """Is forward mode active in this thread? Torch has one count of levels for all threads."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return forward_ad._current_level >= 0
    innermost = _functorch.peek_interpreter_stack()
    if innermost is not None and innermost.key() == TransformType.Jvp:
        return True
    if TransformType.Jvp in active():
        return True
    return holds_alone(lambda: forward_ad._current_level >= 0 and not eager_transforms.JVP_NESTING)


def below_transforms(tensor: Tensor) -> Tensor:
    """The tensor without the wrappers of all levels, with the dimensions of the vmaps outside."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def off_graph(leaves: Leaves) -> Leaves:
    """The leaves detached from plain graphs, which lead to what a function closes over."""
    return tuple([x.detach() if below_transforms(x).requires_grad else x for x in leaves])


def lacks_forward_kernel(func: Any) -> bool:
    """Is it an operator without forward mode? Those of ``torch.library.custom_op`` have none."""
    if isinstance(func, torch._ops.OpOverloadPacket):  # which overload it is, C++ finds out
        return any(lacks_forward_kernel(getattr(func, name)) for name in func.overloads())
    if not isinstance(func, torch._ops.OpOverload):
        return False
    if func.namespace in {"aten", "prim", "prims", "profiler"}:
        return False
    name = func._schema.name
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return not has_kernel(name, "CompositeImplicitAutograd")
