"""The watch of a function while it runs: what it calls is looked up in the tables of faults.

Errors that a function catches are seen as well. ``tests/faults/test_faults.py`` pins each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._errors import Refused, lacks_forward_rule, writes_outside
from jacfunc._faults.callers import BY_CALLER, TAKES_DERIVATIVES, cuts_off
from jacfunc._faults.formulas import by_formula
from jacfunc._faults.lookups import LOOKUPS, STRIDING, Args, lies_alone, lookup, tensors_of
from jacfunc._faults.operations import MET, RULES
from jacfunc._remembered import Remembered
from jacfunc._torch import (
    DRAWING,
    Pull,
    below_transforms,
    is_batched,
    is_pushing,
    is_right_twice,
    may_draw,
    num_derivatives,
)
from jacfunc._types import Leaves

_OF_A_TRANSFORM = ("vmap", "functorch", "that doesn't have storage")


class Watch(TorchFunctionMode):
    """Watches a function while it runs, for what its graph does not show.

    What runs inside a ``torch.jit`` function, or compiled, can't be watched.

    Args:
        pull: what follows, if it is a pullback.
        keeps_graph: may plain graphs be kept of what comes out?
        primals: what the function is differentiated by.
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
    has_cut_off = False
    """Has the function taken a derivative that keeps no graph, of what it is differentiated by?"""

    def __init__(
        self,
        pull: Pull | None = None,
        keeps_graph: bool = True,
        primals: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self._primals = primals
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
        if func in RULES:
            self._note(func, args, kwargs)
            return RULES[func](func, args, kwargs)
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        return by_formula(func, args, kwargs, self._is_derived_again)

    def _note(self, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> None:
        """What a call that has a rule tells of the function."""
        if func in DRAWING:
            self.drew |= may_draw(func, args, kwargs)
            return
        self.strides |= func in STRIDING
        is_plain = func in BY_CALLER or (func in LOOKUPS and lookup(args, kwargs) is None)
        self.met |= not is_plain
        if func is Tensor.detach or func in TAKES_DERIVATIVES:
            self.has_cut_off |= cuts_off(func, args, kwargs, self._primals)

    def _is_derived_again(self, tensor: Tensor) -> bool:
        """May a derivative through the tensor be wrong, as it is differentiated in turn?

        The second is right, where a pullback of ours takes the first row by row; the third is not.
        """
        order, leads_out = num_derivatives(tensor), False
        if self._keeps_graph and below_transforms(tensor).requires_grad:
            watches = [w for w in (self, *_modes()) if isinstance(w, Watch) and w._pull]
            pulls = [w._pull.leads_out for w in watches if w._pull and w._pull.leads_out]
            order += len(pulls)
            leads_out = pulls[-1](tensor) if pulls else order > 0
        if order < 2 and not leads_out:
            return False
        self.met = True
        watch_on()  # those outside meet the parts of a formula alone
        if leads_out or order > 2:
            return True
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


def watch_on() -> None:
    """Whoever takes derivatives of derivatives is watched at every call: watches count orders."""
    for watch in _modes() if torch._C._len_torch_function_stack() else ():
        if isinstance(watch, Watch):
            watch.met = True


@cache
def unwatched() -> Remembered[bool]:
    """Functions that met nothing when they were watched; are they called alone, for a module?"""
    return Remembered()


def name_of(func: Callable[..., Any]) -> str:
    """As the tables have it.

    Graphs of torch.fx and torch.export call overloads, decomposed ones under private names.
    """
    name: str = getattr(func, "_opname", getattr(func, "__name__", ""))
    return name.lstrip("_")
