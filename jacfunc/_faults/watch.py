"""The watch: while a function runs, each operation it calls is looked up in the tables of faults.

A watch also sees errors that the function catches. ``tests/faults/test_faults.py`` has tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._errors import Refused, lacks_forward_rule, writes_outside
from jacfunc._faults.callers import BY_CALLER, TAKES_DERIVATIVES, WAYS_OUT, Frozen, cuts_off
from jacfunc._faults.formulas import formula_of
from jacfunc._faults.lookups import (
    LOOKUPS,
    STRIDING,
    Args,
    is_plain_index,
    lies_alone,
    lookup,
    tensors_of,
)
from jacfunc._faults.operations import ASKING, FREEZING, RULES, WATCHED
from jacfunc._remembered import Remembered
from jacfunc._torch import (
    DRAWING,
    Pull,
    all_modes,
    below_transforms,
    is_batched,
    is_pushing,
    is_right_twice,
    may_draw,
    num_derivatives,
)
from jacfunc._types import Leaves

_ONLY_NOTED = BY_CALLER | WAYS_OUT
_OF_A_TRANSFORM = ("vmap", "functorch", "that doesn't have storage")


class Watch(TorchFunctionMode):
    """A context that watches a function for faults that its graph does not show.

    It sees nothing of what runs inside a ``torch.jit`` function, or compiled.

    Args:
        pull: the pullback that follows, if one does.
        keeps_graph: may plain graphs of the outputs be kept?
        primals: the tensors that the function is differentiated by.
    """

    _caught: Any = None
    stays_watched = False
    """Must the function be watched again: was there a rule or a formula, or are numbers read?

    Where it ``leaves_torch``, too, unless it is known to call the same operations."""
    drew = False
    """Has the function drawn random numbers?"""
    leaves_torch = False
    """Has the function handed numbers to other code than torch?"""
    strides = False
    """Has the function read memory by strides?"""
    pushes = False
    """Is the function pushed forward by jacfunc?"""
    has_cut_off = False
    """Has the function taken a derivative without a graph of something that depends on primals?"""

    def __init__(
        self,
        pull: Pull | None = None,
        keeps_graph: bool = True,
        primals: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self._frozen = Frozen()
        self._primals = primals
        self._pull = pull
        self._keeps_graph = keeps_graph

    @property
    def lets_products_pass(self) -> bool:
        """Is nothing done about products? It is where tensors count as constants for a while."""
        return not self._frozen.tensors

    def __enter__(self) -> Self:
        torch._C._push_on_torch_function_stack(self)  # what the base class does, in fewer steps
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Args = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # called for every operation: as short as it can be
        try:
            if self._frozen.tensors and func not in FREEZING and func is not ASKING:
                args, kwargs = self._frozen.made_constant((args, kwargs or {}))
            if is_pushing():
                return self.pushed(func, args, kwargs or {})
            if func not in WATCHED:
                return func(*args, **kwargs) if kwargs else func(*args)
            return self.by_rule(func, args, kwargs or {})
        except (RuntimeError, IndexError) as error:
            self.remember(error, args, kwargs or {})
            raise

    def pushed(self, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
        """A call in forward mode."""
        if func not in WATCHED:
            return func(*args, **kwargs)
        return self.by_rule(func, args, kwargs)

    def by_rule(self, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> Any:
        """What an operation returns that has a rule or a formula."""
        if func in RULES:
            self._note(func, args, kwargs)
            if func in FREEZING and self._frozen.switches(args, kwargs):
                return args[0]
            if func is ASKING and self._frozen.has(args[0]):
                return False
            return RULES[func](func, args, kwargs)
        formula = None if torch.compiler.is_compiling() else formula_of(func, args, kwargs)
        if formula is None or not formula.is_needed(self._is_derived_again):
            return func(*args, **kwargs)
        self.stays_watched = True
        return formula.result(lambda: func(*args, **kwargs))

    def _note(self, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]) -> None:
        """Note what the call of an operation with a rule tells about the function."""
        if func in DRAWING:
            self.drew |= may_draw(func, args, kwargs)
            return
        self.leaves_torch |= func in WAYS_OUT
        self.strides |= func in STRIDING
        is_plain = func in _ONLY_NOTED or (func in LOOKUPS and lookup(args, kwargs) is None)
        self.stays_watched |= not (is_plain or is_plain_index(func, args))
        if func is Tensor.detach or func in TAKES_DERIVATIVES:
            self.has_cut_off |= cuts_off(func, args, kwargs, self._primals)

    def _is_derived_again(self, tensor: Tensor, ever: bool = False) -> bool:
        """May a derivative through the tensor be wrong because it is differentiated in turn?

        A second derivative is right if jacfunc's pullback takes the first row by row, unless it is
        wrong wherever it is taken, ``ever``. A third is not.
        """
        order, leads_out = num_derivatives(tensor), False
        if self._keeps_graph and below_transforms(tensor).requires_grad:
            watches = [w for w in (self, *all_modes()) if isinstance(w, Watch) and w._pull]
            pulls = [w._pull for w in watches if w._pull and w._pull.leads_out]
            order += sum(pull.order for pull in pulls)
            outer = pulls[-1].leads_out if pulls else None
            leads_out = order > 0 if outer is None else outer(tensor)
        if order < 2 and not leads_out:
            return False
        self.stays_watched = True
        watch_on()  # the outer watches see only the parts of a formula
        if ever or leads_out or order > 2:
            return True
        return self._pull is None or not is_right_twice(self._pull.level)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        torch._C._pop_torch_function_stack()
        caught, self._caught = error or self._caught, None
        if caught is None or (error is None and was_handled(caught)):
            return
        # an outer watch has seen it, too, but from here on it is not the function that handles it
        caught.left_a_watch = True
        if error is None:
            if isinstance(caught, Refused):
                raise caught
            raise Refused(f"func goes on after an error that it caught: {caught}") from caught

    def check_copies(self, primals: Leaves) -> None:
        """Check that reads by strides see the same in the copies that the function got.

        Raises:
            Refused: if the function reads by strides, and a copy has other strides than its primal.
        """
        if self.strides and not all(map(lies_alone, primals)):
            raise Refused("it reads memory by strides, beside the entries of an input or parameter")

    def remember(self, error: Any, args: Args, kwargs: Mapping[str, Any]) -> None:
        """Keep an error that the function, for one sample and without transforms, may not raise.

        If the function catches it, the result may be wrong: then leaving the watch refuses it.
        """
        if torch.compiler.is_compiling() or hasattr(error, "left_a_watch"):
            return
        if lacks_forward_rule(error) or writes_outside(error):
            is_ours = self.pushes  # if not, a derivative inside the function raised it
        else:
            is_ours = isinstance(error, Refused)
            is_ours = is_ours or any(words in str(error) for words in _OF_A_TRANSFORM)
            is_ours = is_ours or any(map(is_batched, tensors_of(args, kwargs)))
        if is_ours and (self._caught is None or was_handled(self._caught)):
            self._caught = error


def handled(error: Exception) -> None:
    """Mark an error that jacfunc has handled inside the function, which does not see it."""
    if torch.compiler.is_compiling():  # it can't trace this, and watches do not run there
        return
    error.was_handled = True  # type: ignore[attr-defined]


def was_handled(error: Exception) -> bool:
    """Has :func:`handled` marked the error?"""
    return hasattr(error, "was_handled")


def is_watching() -> bool:
    """Is a function evaluated of which a derivative of ours is taken, and watched?"""
    return any(isinstance(mode, Watch) for mode in all_modes())


def watch_on() -> list[tuple[Watch, bool]]:
    """Make outer watches watch again: they count orders of derivatives, and one is taken here.

    Returns:
        These watches, and whether each has seen numbers leave torch.
    """
    watches = [watch for watch in all_modes() if isinstance(watch, Watch)]
    for watch in watches:
        watch.stays_watched = True
    return [(watch, watch.leaves_torch) for watch in watches]


@cache
def unwatched() -> Remembered[bool]:
    """Functions that need no watch any more; True for those that must run alone, for a module."""
    return Remembered()


def name_of(func: Callable[..., Any]) -> str:
    """The name of a function in the tables.

    Graphs of torch.fx and torch.export call overloads, some of them under private names.
    """
    name: str = getattr(func, "_opname", getattr(func, "__name__", ""))
    return name.lstrip("_")
