"""What no graph shows, in one table: seen while the function runs, and refused or done right.

Functions that torch takes for constants, formulas that break down, errors that a function catches.
Each entry is pinned by a test in ``tests/test_faults.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from jacfunc._check import Refused, is_differentiable
from jacfunc._draws import DRAWING, may_draw
from jacfunc._formulas import FORMULAS, by_formula
from jacfunc._functorch import (
    below_transforms,
    inside_functorch,
    inside_transform,
    is_batched,
    is_pushing,
    is_right_twice,
    lacks_forward_rule,
    num_derivatives,
    writes_outside,
)
from jacfunc._known import KnownKinds
from jacfunc._lock import alone
from jacfunc._misread import (
    LOOKUPS,
    STRIDING,
    Args,
    as_strided,
    embedding,
    forms,
    is_tracked_now,
    lies_alone,
    lookup,
    tensors_of,
)
from jacfunc._types import Leaves

_Rule = Callable[[Callable[..., Any], Args, Mapping[str, Any]], Any]


def _refuse_if_tracked(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    if any(map(is_tracked_now, tensors_of(args, kwargs))):
        name = getattr(func, "__name__", str(func)).removeprefix("special_").partition(".")[0]
        raise Refused(f"torch has no derivative of {name} and takes it for a constant")
    return func(*args, **kwargs)


def _refuse_if_derived(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    if any(map(is_tracked_now, tensors_of(args, kwargs))):
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        raise Refused(f"torch's backward pass of {name} is wrong (it keeps what is overwritten)")
    return func(*args, **kwargs)


def _set_data(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Refused inside transforms, whose tensors torch leaves there when their level has ended."""
    if inside_functorch():
        raise Refused("it sets the data of a tensor, which torch does wrong inside a transform")
    return func(*args, **kwargs)


def _requires_grad(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> bool:
    """As it is below vmap, which hides the graph: functions set hooks where there is one."""
    if func(*args):
        return True
    with unseen():  # watches outside have been asked already
        return not is_pushing() and below_transforms(args[0]).requires_grad


def _require_grad(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Torch refuses it in a transform, where it is needed for derivatives inside alone.

    Those of ``torch.autograd.functional`` would be zero without it.
    """
    wanted = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
    if not wanted or not inside_transform() or _asker() == _FUNCTIONAL:
        return func(*args, **kwargs)
    return args[0]


def _refuse_in_checkpoint(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A reentrant checkpoint switches gradients off, and leaves no trace of what runs inside."""
    if _asking_frame().f_code is CheckpointFunction.forward.__code__:
        raise Refused(REENTRANT)
    return func(*args, **kwargs)


def _asking_frame() -> Any:
    """Of whoever called the operation: neither a watch nor what torch wraps around it."""
    frame: Any = sys._getframe(1)
    while _module_of(frame) in _BETWEEN or _module_of(frame).startswith(f"{__package__}."):
        frame = frame.f_back
    return frame


def _module_of(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _asker() -> str:
    """The module whose code called the operation."""
    return _module_of(_asking_frame())


_BETWEEN = frozenset(
    {"torch.autograd", "torch.autograd.grad_mode", "torch.overrides", "torch._tensor"}
    | {"torch.utils._contextlib"}
)
_FUNCTIONAL = torch.autograd.functional.__name__
REENTRANT = (
    "checkpoints must not be reentrant, got one that is, whose gradients torch gives to backward() "
    "alone. Pass use_reentrant=False to checkpoint"
)


def _sinc(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """By a formula of our own where it is differentiated: torch's has a pole of its own at 0."""
    x = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if "out" in kwargs or not is_differentiable(x) or x.is_complex() or not is_tracked_now(x):
        return func(*args, **kwargs)
    # torch rounds half precision once, at the end
    value = sinc(x if x.dtype in (torch.float32, torch.float64) else x.float()).to(x.dtype)
    return x.copy_(value) if func is Tensor.sinc_ else value


def sinc(x: Tensor) -> Tensor:
    """``sin(πx) / πx``, by its power series near 0: there the quotient cancels once derived."""
    angle = torch.pi * x
    is_near = angle.abs() < 1
    # outside its own half each branch gets what can't spoil the derivatives of the other
    square = torch.where(is_near, angle, 0.0).square()
    far = torch.where(is_near, 1.0, angle)
    series = torch.ones_like(x)
    for n in range(_TERMS, 0, -1):
        series = 1 - square / (2 * n * (2 * n + 1)) * series
    return torch.where(is_near, series, far.sin() / far)


_TERMS = 11
"""Of the series, the last below the rounding of float64 in the second derivative, too."""


def _draw(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Not while another thread draws its numbers again, from the generator that all share."""
    with alone() if may_draw(func, args, kwargs) else nullcontext():
        return func(*args, **kwargs)


CONSTANT_TO_TORCH = (
    *("airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "spherical_bessel_j0"),
    *(f"modified_bessel_{kind}" for kind in ("i0", "i1", "k0", "k1")),
    *(f"scaled_modified_bessel_{kind}" for kind in ("k0", "k1")),
    *(f"{shifted}chebyshev_polynomial_{k}" for shifted in ("", "shifted_") for k in "tuvw"),
    *("hermite_polynomial_h", "hermite_polynomial_he"),
    *("laguerre_polynomial_l", "legendre_polynomial_p"),
)
_SWITCH: Any = torch._C._set_grad_enabled
ASKING: Any = getattr(Tensor.requires_grad, "__get__")  # noqa: B009 (a property to mypy)
SETTING: Any = getattr(Tensor.data, "__set__")  # noqa: B009
RULES: dict[Callable[..., Any], _Rule] = {
    **{f: _refuse_if_tracked for name in CONSTANT_TO_TORCH for f in forms(f"special_{name}")},
    **dict.fromkeys((*forms("sinc"), Tensor.sinc_), _sinc),
    **dict.fromkeys(DRAWING, _draw),
    **dict.fromkeys(LOOKUPS, embedding),
    **dict.fromkeys(STRIDING, as_strided),
    **dict.fromkeys(forms("as_strided_scatter"), _refuse_if_derived),
    ASKING: _requires_grad,
    SETTING: _set_data,
    Tensor.requires_grad_: _require_grad,
    _SWITCH: _refuse_in_checkpoint,
}
"""What is done instead of a call."""
MET = frozenset(RULES) | frozenset(FORMULAS)

_OF_A_TRANSFORM = ("vmap", "functorch", "that doesn't have storage")


@dataclass(frozen=True, slots=True)
class Pull:
    """What is watched for: a pullback of ours.

    Args:
        level: of functorch; None on a plain graph.
        leads_out: of a plain graph: is what leads to a tensor differentiated further outside?
    """

    level: int | None
    leads_out: Callable[[Tensor], bool] | None = None


class Watch(TorchFunctionMode):
    """Watches a function while it runs, for what its graph does not show.

    What runs inside a ``torch.jit`` function, or compiled, can't be watched.

    Args:
        pull: what follows, if it is a pullback.
        keeps_graph: may plain graphs be kept of what comes out?
    """

    _caught: Any = None
    met = False
    """Was anything seen that has a rule?"""
    drew = False
    """Were random numbers drawn?"""
    strides = False
    """Was memory read by strides?"""
    pushes = False
    """Do tangents pass through the function?"""

    def __init__(self, pull: Pull | None = None, keeps_graph: bool = True) -> None:
        super().__init__()
        self._pull = pull
        self._keeps_graph = keeps_graph

    def __enter__(self) -> Self:
        torch._C._push_on_torch_function_stack(self)  # as torch does, in fewer steps
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Args = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # met by every operation: as short as it can be
        try:
            if is_pushing():
                return self.pushed(func, args, kwargs or {})
            if func not in MET:
                return func(*args, **kwargs) if kwargs else func(*args)
            return self.by_rule(func, args, kwargs or {})
        except (RuntimeError, IndexError) as error:
            self.remember(error, args, kwargs or {})
            raise

    def pushed(self, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
        """A call while tangents pass through."""
        if func not in MET:
            return func(*args, **kwargs)
        return self.by_rule(func, args, kwargs)

    def by_rule(self, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
        """What is done instead of a call that was met."""
        if func in DRAWING:
            self.drew |= may_draw(func, args, kwargs)
        else:
            self.strides |= func in STRIDING
            is_plain = func is _SWITCH or (func in LOOKUPS and lookup(args, kwargs) is None)
            self.met |= not is_plain
        if func in RULES:
            return RULES[func](func, args, kwargs)
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        outer = [mode for mode in _modes() if isinstance(mode, Watch)]
        for watch in outer:  # they meet the parts of a formula alone
            watch.met = True
        return by_formula(func, args, kwargs, partial(self._is_derived_again, outer))

    def _is_derived_again(self, outer: Sequence[Watch], tensor: Tensor) -> bool:
        """May a derivative through the tensor be wrong, as it is differentiated in turn?

        The second is right, where a pullback of ours takes the first row by row; the third is not.
        """
        order, leads_out = num_derivatives(tensor), False
        if self._keeps_graph and below_transforms(tensor).requires_grad:
            pulls = [w._pull.leads_out for w in (self, *outer) if w._pull and w._pull.leads_out]
            order += len(pulls)
            leads_out = pulls[-1](tensor) if pulls else order > 0
        if leads_out or order != 2:
            return leads_out or order > 2
        return self._pull is None or not is_right_twice(self._pull.level)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        torch._C._pop_torch_function_stack()
        caught, self._caught = error or self._caught, None
        if caught is None or (error is None and was_handled(caught)):
            return
        # a watch outside has seen it, too, but what is done about it is no longer the function's
        caught.left_a_watch = True
        if error is None:
            if isinstance(caught, Refused):
                raise caught
            raise Refused(f"func goes on after an error that it caught: {caught}") from caught

    def check_copies(self, primals: Leaves) -> None:
        """Of what the function has got copies of.

        Raises:
            Refused: if it reads memory by strides, where a copy does not lie as the primal does.
        """
        if self.strides and not all(map(lies_alone, primals)):
            raise Refused("it reads memory by strides, beside the entries of an input or parameter")

    def remember(self, error: Any, args: Args, kwargs: Mapping[str, Any]) -> None:
        """Errors that a sample alone, without our transforms, may not have raised."""
        if torch.compiler.is_compiling() or hasattr(error, "left_a_watch"):
            return
        if lacks_forward_rule(error) or writes_outside(error):
            is_ours = self.pushes  # else it is of a derivative that the function takes itself
        else:
            is_ours = isinstance(error, Refused)
            is_ours = is_ours or any(words in str(error) for words in _OF_A_TRANSFORM)
            is_ours = is_ours or any(map(is_batched, tensors_of(args, kwargs)))
        if is_ours and (self._caught is None or was_handled(self._caught)):
            self._caught = error


def handled(error: Exception) -> None:
    """An inner door goes on in another way, and the function never hears of it."""
    error.was_handled = True  # type: ignore[attr-defined]


def was_handled(error: Exception) -> bool:
    return hasattr(error, "was_handled")


def _modes() -> list[Any]:
    """Those outside, the nearest first."""
    count: int = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(n) for n in reversed(range(count))]


@cache
def unwatched() -> KnownKinds:
    """Functions that met nothing when they were watched, in this process."""
    return KnownKinds()


def unseen() -> AbstractContextManager[Any]:
    """Our own bookkeeping is no operation of the function: modes outside would look at each step,
    which took a tenth of a small network's evaluation.
    """
    return torch._C.DisableTorchFunction()
