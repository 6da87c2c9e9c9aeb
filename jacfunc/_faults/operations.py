"""The table of operations that are refused, or replaced, while a function runs under a watch.

They are faults that no graph shows: functions that torch takes for constants, formulas that break
down, calls that a transform does wrong. ``tests/faults/test_faults.py`` pins each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import Refused
from jacfunc._faults.callers import (
    READING,
    REENTRANT,
    SWITCH,
    TAKES_DERIVATIVES,
    WAYS_OUT,
    as_it_is,
    is_checked_for_checkpoint,
    refuse_in_checkpoint,
    require_grad,
)
from jacfunc._faults.formulas import FORMULAS
from jacfunc._faults.lookups import (
    LOOKUPS,
    STRIDING,
    Args,
    as_strided,
    embedding,
    forms,
    is_tracked_now,
    tensors_of,
)
from jacfunc._lock import alone
from jacfunc._torch import (
    DRAWING,
    below_transforms,
    innermost,
    is_batched,
    is_pushing,
    may_draw,
    num_derivatives,
)
from jacfunc._types import is_differentiable

_Rule = Callable[[Callable[..., Any], Args, Mapping[str, Any]], Any]


def _refuse_if_tracked(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A function that torch has no derivative of; refused where one is needed."""
    if any(map(is_tracked_now, tensors_of(args, kwargs))):
        name = getattr(func, "__name__", str(func)).removeprefix("special_").partition(".")[0]
        raise Refused(f"torch has no derivative of {name} and takes it for a constant")
    return func(*args, **kwargs)


def _refuse_if_derived(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A function whose backward pass is wrong; refused where it is needed."""
    if any(map(is_tracked_now, tensors_of(args, kwargs))):
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        raise Refused(f"torch's backward pass of {name} is wrong (it keeps what is overwritten)")
    return func(*args, **kwargs)


def _set_data(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """``tensor.data = …``; refused inside transforms, whose wrappers would outlive their level."""
    if innermost() is not None:
        raise Refused("it sets the data of a tensor, which torch does wrong inside a transform")
    return func(*args, **kwargs)


def _cut(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """``tensor.data`` and ``tensor.detach_()``, which torch cuts off the innermost transform alone.

    Of all others ``tensor.detach()`` cuts it off, which is another tensor.
    """
    result = func(*args, **kwargs)
    with torch._C.DisableTorchFunction():  # outer watches have seen the call already
        if not (innermost() is not None and is_tracked_now(result)):
            return result
    if func is Tensor.detach_:
        raise Refused("detach_() of a tensor leaves what outer transforms know of it; use detach()")
    return args[0].detach()


def _requires_grad(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> bool:
    """``tensor.requires_grad`` as it is below vmap, which hides it; functions then set hooks."""
    if is_checked_for_checkpoint():
        raise Refused(REENTRANT)
    if func(*args):
        return True
    with torch._C.DisableTorchFunction():  # outer watches have seen the call already
        return not is_pushing() and below_transforms(args[0]).requires_grad


def _read_graph(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """``tensor.grad_fn`` or ``tensor.is_leaf``; refused where a transform shows none of the graph.

    Functions branch by it, or set hooks on the node.
    """
    found = func(*args)
    with torch._C.DisableTorchFunction():  # outer watches have seen the call already
        is_hidden = is_tracked_now(args[0]) and not args[0].requires_grad
    if is_hidden:
        raise Refused("it looks at the graph behind a tensor, which a transform does not show")
    return found


def _write_out(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """The text of a tensor; refused under vmap, where it is none of a sample's numbers.

    Functions choose by such a text, too.
    """
    with torch._C.DisableTorchFunction():  # outer watches have seen the call already
        if is_batched(args[0]):
            raise Refused("it writes a tensor out, of which vmap shows no numbers")
    return func(*args, **kwargs)


def _sinc(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """``torch.sinc``, by :func:`sinc` if differentiated: torch's derivative has a pole at 0."""
    x = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if "out" in kwargs or not is_differentiable(x) or x.is_complex() or not is_tracked_now(x):
        return func(*args, **kwargs)
    # torch rounds half precision once, at the end
    value = sinc(x if x.dtype in (torch.float32, torch.float64) else x.float()).to(x.dtype)
    return x.copy_(value) if func is Tensor.sinc_ else value


def sinc(x: Tensor) -> Tensor:
    """``sin(πx) / πx``; near 0 by its power series, where derivatives of the quotient cancel."""
    angle = torch.pi * x
    is_near = angle.abs() < 1
    # where a branch is not taken it gets a number that can't make its derivative nan
    square = torch.where(is_near, angle, 0.0).square()
    far = torch.where(is_near, 1.0, angle)
    series = torch.ones_like(x)
    for n in range(_TERMS, 0, -1):
        series = 1 - square / (2 * n * (2 * n + 1)) * series
    return torch.where(is_near, series, far.sin() / far)


_TERMS = 11
"""Terms of the series: the next is below float64's rounding, even in the second derivative."""


def _draw(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A function that may draw; it waits while another thread uses the shared generator again."""
    with alone() if may_draw(func, args, kwargs) else nullcontext():
        return func(*args, **kwargs)


def _hook(func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
    """A hook on a gradient, which acts at the innermost level alone; a plain graph calls it twice.

    Raises:
        Refused: if a derivative is differentiated in turn.
    """
    if num_derivatives(args[0]) > 1:
        raise Refused("a derivative of another one passes by hooks of tensors inside a transform")
    return func(*args, **kwargs)


CONSTANT_TO_TORCH = (
    *("airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "spherical_bessel_j0"),
    *(f"modified_bessel_{kind}" for kind in ("i0", "i1", "k0", "k1")),
    *(f"scaled_modified_bessel_{kind}" for kind in ("k0", "k1")),
    *(f"{shifted}chebyshev_polynomial_{k}" for shifted in ("", "shifted_") for k in "tuvw"),
    *("hermite_polynomial_h", "hermite_polynomial_he"),
    *("laguerre_polynomial_l", "legendre_polynomial_p"),
)
ASKING: Any = getattr(Tensor.requires_grad, "__get__")  # noqa: B009 (a property to mypy)
DATA: Any = getattr(Tensor.data, "__get__")  # noqa: B009
SETTING: Any = getattr(Tensor.data, "__set__")  # noqa: B009
REQUIRING: Any = getattr(Tensor.requires_grad, "__set__")  # noqa: B009
READS_GRAPH: Any = [getattr(getattr(Tensor, name), "__get__") for name in ("grad_fn", "is_leaf")]  # noqa: B009
FREEZING = frozenset({REQUIRING, Tensor.requires_grad_})
"""Operations that say whether a tensor requires a gradient."""
RULES: dict[Callable[..., Any], _Rule] = {
    **{f: _refuse_if_tracked for name in CONSTANT_TO_TORCH for f in forms(f"special_{name}")},
    **dict.fromkeys((*forms("sinc"), Tensor.sinc_), _sinc),
    **dict.fromkeys(DRAWING, _draw),
    **dict.fromkeys(LOOKUPS, embedding),
    **dict.fromkeys(STRIDING, as_strided),
    **dict.fromkeys(forms("as_strided_scatter"), _refuse_if_derived),
    ASKING: _requires_grad,
    **dict.fromkeys(READS_GRAPH, _read_graph),
    **dict.fromkeys((DATA, Tensor.detach_), _cut),
    SETTING: _set_data,
    REQUIRING: as_it_is,
    Tensor.requires_grad_: require_grad,
    **dict.fromkeys((Tensor.detach, Tensor.__getitem__, *WAYS_OUT, *READING), as_it_is),
    Tensor.__repr__: _write_out,
    **dict.fromkeys(TAKES_DERIVATIVES, as_it_is),
    SWITCH: refuse_in_checkpoint,
    Tensor.register_hook: _hook,
}
"""For each operation what is done instead of a call."""
WATCHED = frozenset(RULES) | frozenset(FORMULAS)
"""All operations that a watch does something about."""
SEEN_OTHERWISE = frozenset({ASKING, SWITCH})
"""Operations that forward mode does rightly under its watch alone."""
