"""What no graph shows, in one table: seen while the function runs, and refused or done right.

Functions that torch takes for constants, formulas that break down, errors that a function catches.
Each entry is pinned by a test in ``tests/test_faults.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from jacfunc._check import Refused, is_differentiable, is_tensor
from jacfunc._draws import DRAWING, may_draw
from jacfunc._functorch import (
    below_transforms,
    is_batched,
    is_derived_again,
    is_pushing,
    is_tracked,
    lacks_forward_rule,
)
from jacfunc._known import KnownKinds
from jacfunc._lock import alone
from jacfunc._norms import NORMS, by_formula
from jacfunc._tree import flatten

_Args = tuple[Any, ...]
_Rule = Callable[[Callable[..., Any], _Args, Mapping[str, Any]], Any]


def _refuse_if_tracked(func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> Any:
    if any(map(_is_tracked_now, tensors_in(args, kwargs))):
        name = getattr(func, "__name__", str(func)).removeprefix("special_").partition(".")[0]
        raise Refused(f"torch has no derivative of {name} and takes it for a constant")
    return func(*args, **kwargs)


def _requires_grad(func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> bool:
    """As it is below vmap, which hides the graph: functions set hooks where there is one."""
    return func(*args) or (not is_pushing() and below_transforms(args[0]).requires_grad)


def _sinc(func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> Any:
    """By a formula of our own where it is differentiated: torch's has a pole of its own at 0."""
    x = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if "out" in kwargs or not is_differentiable(x) or x.is_complex() or not _is_tracked_now(x):
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


class Lookup(NamedTuple):
    """A lookup in a table whose gradient is not that of any lookup."""

    table: Tensor
    indices: Tensor
    padding: int | None
    """Its row gets no gradient."""
    by_frequency: bool
    """Is a row's gradient divided by how often it is looked up?"""
    named: dict[str, Any]
    """All arguments but the padding, by name."""

    @property
    def is_padding(self) -> Tensor:
        """Which entries of the index look the padding up."""
        assert self.padding is not None
        return self.indices == self.padding % self.table.shape[0]


def lookup(args: _Args, kwargs: Mapping[str, Any]) -> Lookup | None:
    """From the arguments of torch.nn.functional.embedding, or of torch.embedding below it."""
    is_below = "indices" in kwargs or is_differentiable(args[0] if args else None)
    named = dict(zip(_BELOW if is_below else _ABOVE, args, strict=False)) | dict(kwargs)
    padding = named.pop("padding_idx", None)
    if is_below and padding is not None and padding < 0:  # there it means that there is none
        padding = None
    by_frequency = bool(named.get("scale_grad_by_freq"))
    if padding is None and not by_frequency:
        return None
    indices = named["indices" if is_below else "input"]
    return Lookup(named["weight"], indices, padding, by_frequency, named)


def _embedding(func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> Any:
    """Under vmap by what vmap is right in: its own rule puts all lookups into one.

    Then one row of all samples' tables is the padding, and rows are counted over all samples.
    """
    found = lookup(args, kwargs)
    if found is None or not (is_batched(found.indices) and _is_tracked_now(found.table)):
        return func(*args, **kwargs)
    if not is_batched(found.table):
        if found.by_frequency:
            raise Refused("under vmap torch counts how often all samples look a row up")
        return func(*args, **kwargs)
    rows = func(**found.named)
    if found.padding is None:
        return rows
    return torch.where(found.is_padding.unsqueeze(-1), rows.detach(), rows)


_ABOVE = (
    *("input", "weight", "padding_idx"),
    *("max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
)
_BELOW = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
_TERMS = 11
"""Of the series, the last below the rounding of float64 in the second derivative, too."""


def _draw(func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> Any:
    """Not while another thread draws its numbers again, from the generator that all share."""
    with alone() if may_draw(func, args, kwargs) else nullcontext():
        return func(*args, **kwargs)


def _is_tracked_now(tensor: Tensor) -> bool:
    """Compilers can't be asked."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and is_tracked(tensor)


def tensors_in(args: _Args, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What a call takes, at whatever depth."""
    return list(filter(is_tensor, flatten((args, dict(kwargs)))[0]))


def _forms(name: str) -> list[Callable[..., Any]]:
    """What is met when it is called by this name; graphs of torch.fx call overloads."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    places = (torch, torch.special, Tensor)
    named = [getattr(place, name.removeprefix("special_"), None) for place in places]
    return [packet, *overloads, *filter(None, named)]


CONSTANT_TO_TORCH = (
    *("airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "spherical_bessel_j0"),
    *(f"modified_bessel_{kind}" for kind in ("i0", "i1", "k0", "k1")),
    *(f"scaled_modified_bessel_{kind}" for kind in ("k0", "k1")),
    *(f"{shifted}chebyshev_polynomial_{k}" for shifted in ("", "shifted_") for k in "tuvw"),
    *("hermite_polynomial_h", "hermite_polynomial_he"),
    *("laguerre_polynomial_l", "legendre_polynomial_p"),
)
LOOKUPS = frozenset({F.embedding, *_forms("embedding")})
ASKING: Any = getattr(Tensor.requires_grad, "__get__")  # noqa: B009 (a property to mypy)
RULES: dict[Callable[..., Any], _Rule] = {
    **{f: _refuse_if_tracked for name in CONSTANT_TO_TORCH for f in _forms(f"special_{name}")},
    **dict.fromkeys((*_forms("sinc"), Tensor.sinc_), _sinc),
    **dict.fromkeys(DRAWING, _draw),
    **dict.fromkeys(LOOKUPS, _embedding),
    ASKING: _requires_grad,
}
"""What is done instead of a call."""
MET = frozenset(RULES) | frozenset(NORMS)

_OF_A_TRANSFORM = ("vmap", "functorch", "that doesn't have storage")


class Watch(TorchFunctionMode):
    """Watches a function while it runs, for what its graph does not show.

    What runs inside a ``torch.jit`` function, or compiled, can't be watched.

    Args:
        is_derived_again: is a derivative that passes through a tensor differentiated in turn?
    """

    _caught: Any = None
    met = False
    """Was anything seen that has a rule?"""
    drew = False
    """Were random numbers drawn?"""

    def __init__(self, is_derived_again: Callable[[Tensor], bool] = is_derived_again) -> None:
        super().__init__()
        self._is_derived_again = is_derived_again

    def __enter__(self) -> Self:
        torch._C._push_on_torch_function_stack(self)  # as torch does, in fewer steps
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: _Args = (),
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

    def pushed(self, func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> Any:
        """A call while tangents pass through."""
        if func not in MET:
            return func(*args, **kwargs)
        return self.by_rule(func, args, kwargs)

    def by_rule(self, func: Callable[..., Any], args: _Args, kwargs: Mapping[str, Any]) -> Any:
        """What is done instead of a call that was met."""
        if func in DRAWING:
            self.drew |= may_draw(func, args, kwargs)
        else:
            self.met |= func not in LOOKUPS or lookup(args, kwargs) is not None
        if func in RULES:
            return RULES[func](func, args, kwargs)
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        return by_formula(func, args, kwargs, self._is_derived_again)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        torch._C._pop_torch_function_stack()
        caught, self._caught = error or self._caught, None
        if caught is None:
            return
        # a watch outside has seen it, too, but what is done about it is no longer the function's
        caught.left_a_watch = True
        if error is None:
            if isinstance(caught, Refused):
                raise caught
            raise Refused(f"func goes on after an error that it caught: {caught}") from caught

    def remember(self, error: Any, args: _Args, kwargs: Mapping[str, Any]) -> None:
        """Errors that a sample alone, without our transforms, may not have raised."""
        if torch.compiler.is_compiling() or hasattr(error, "left_a_watch"):
            return
        is_ours = isinstance(error, Refused) or lacks_forward_rule(error)
        is_ours = is_ours or any(words in str(error) for words in _OF_A_TRANSFORM)
        if is_ours or any(map(is_batched, tensors_in(args, kwargs))):
            self._caught = error


@cache
def unwatched() -> KnownKinds:
    """Functions that met nothing when they were watched, in this process."""
    return KnownKinds()


def unseen() -> AbstractContextManager[Any]:
    """Our own bookkeeping is no operation of the function: modes outside would look at each step,
    which took a tenth of a small network's evaluation.
    """
    return torch._C.DisableTorchFunction()
