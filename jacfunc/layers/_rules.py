"""The table of rules, and the decorators that enter functions into it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any, TypeAlias, TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from jacfunc.layers._forms import Form

FormOf: TypeAlias = Callable[[Tensor], Form]
"""Makes the form of a parameter from cotangents ``[K, B, *z]`` of the operation's output z."""

Func = TypeVar("Func", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """How an operation uses its arguments.

    Args:
        forms_of: takes the operation's own arguments, each tensor as ``[B, *shape]``, and returns
            by name how to make the form of each argument that may be a parameter.
        defaults: the names of these arguments, in order, and their defaults.
        keeps_lead: the first argument may have more dimensions in front, which the output has,
            too.
        rest: the name of the argument that takes all further ones by position, as a tuple.
    """

    forms_of: Callable[..., Mapping[str, FormOf]]
    defaults: Mapping[str, Any]
    keeps_lead: bool = False
    rest: str | None = None

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments by name; None for a call that the rule does not know."""
        if self.rest is not None:
            count = list(self.defaults).index(self.rest)
            args = *args[:count], args[count:]
        if len(args) > len(self.defaults) or (kwargs and not kwargs.keys() <= self.defaults.keys()):
            return None
        named = dict(self.defaults)
        named.update(zip(self.defaults, args, strict=False))
        named.update(kwargs)
        return named


@dataclass(frozen=True)
class Table:
    """All rules.

    Args:
        rules: the rule of each operation that has one.
        openings: for some operations, a function that does the same by simpler operations.
    """

    rules: dict[Callable[..., Any], Rule] = field(default_factory=dict)
    openings: dict[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)


@cache
def table() -> Table:
    """The table of this process."""
    return Table()


def rule(
    *functions: Callable[..., Any], keeps_lead: bool = False, rest: str | None = None
) -> Callable[[Func], Func]:
    """Decorate a function that says how operations use their parameters.

    The decorated function takes the operations' own arguments, each tensor as ``[B, *shape]`` of
    all samples. It returns, by name, for each argument that may be a parameter a function that
    makes a form from the cotangents ``[K, B, *z]`` of the output. For a call that it does not
    know it returns an empty dict; then the parameter is differentiated without factors.

    Args:
        functions: functions of torch, or your own if they are :func:`visible`; all of them take
            the same arguments.
        keeps_lead: their first argument may have any number of dimensions in front, and the output
            has them, too, as with a linear layer. Then the operation is called once with all
            samples, not under vmap, which would make it of simpler operations.
        rest: the argument of the decorated function that takes all further arguments by position,
            as a tuple, where the operations take any number of them.

    Returns:
        A decorator, which returns the decorated function as it is.

    Example:
        A layer of your own, whose kernel and Jacobians are then made from its factors:

        >>> import torch, jacfunc
        >>> from jacfunc.layers import Outer, positions, rule, visible
        >>> @visible
        ... def doubled(x, weight):
        ...     return 2 * x @ weight.T
        >>> @rule(doubled)
        ... def of_doubled(x, weight):
        ...     def form(seeds):
        ...         return Outer(positions(2 * x, 1), positions(seeds, 2), weight.shape[1:])
        ...     return {"weight": form}
        >>> jacfunc.ntk(lambda w, x: doubled(x, w), torch.ones(1, 3), torch.ones(2, 3)).squeeze()
        tensor([[12., 12.],
                [12., 12.]])
    """

    def register(forms_of: Func) -> Func:
        parameters = inspect.signature(forms_of).parameters.values()
        defaults = {p.name: None if p.default is p.empty else p.default for p in parameters}
        table().rules.update(dict.fromkeys(functions, Rule(forms_of, defaults, keeps_lead, rest)))
        return forms_of

    return register


def opening(*functions: Callable[..., Any]) -> Callable[[Func], Func]:
    """Decorate a function that does what ``functions`` do, by simpler operations with rules.

    It is called instead of them, so that the uses of parameters inside can be seen.

    Args:
        functions: functions of torch, or your own if they are :func:`visible`; all of them take
            the same arguments.

    Returns:
        A decorator, which returns the decorated function as it is.

    Example:
        >>> import torch, jacfunc
        >>> from jacfunc.layers import opening, visible
        >>> @visible
        ... def compiled(x, weight):
        ...     return torch.nn.functional.linear(x, weight)
        >>> @opening(compiled)
        ... def simply(x, weight):
        ...     return torch.nn.functional.linear(x, weight)
        >>> jacfunc.ntk(lambda w, x: compiled(x, w), torch.ones(1, 3), torch.ones(1, 3)).squeeze()
        tensor(3.)
    """

    def register(simpler: Func) -> Func:
        table().openings.update(dict.fromkeys(functions, simpler))
        return simpler

    return register


def visible(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of your own an operation, for which a rule can be registered.

    Args:
        func: takes tensors. Its arguments themselves may be parameters, not what is inside them.

    Returns:
        A function that does the same, and that torch's function modes see as one operation.

    Example:
        >>> import torch
        >>> from jacfunc.layers import visible
        >>> visible(torch.sin)(torch.zeros(2))
        tensor([0., 0.])
    """

    @wraps(func)
    def operation(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(operation, tensors, *args, **kwargs)
        return func(*args, **kwargs)

    return operation
