"""The tables of what is known about operations: how a parameter is used in each."""

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
"""From cotangents ``[K, B, *z]`` of what came out."""

Func = TypeVar("Func", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """How an operation uses its arguments.

    Args:
        forms_of: takes the operation's own arguments, tensors as ``[B, *shape]``, and gives a
            form for each by name of which it knows one.
        defaults: of these arguments.
        keeps_lead: the first argument may have more dimensions in front, which come out as they
            went in.
    """

    forms_of: Callable[..., Mapping[str, FormOf]]
    defaults: Mapping[str, Any]
    keeps_lead: bool = False

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments by name; None for a call that the rule does not know."""
        if len(args) > len(self.defaults) or not kwargs.keys() <= self.defaults.keys():
            return None
        return {**self.defaults, **dict(zip(self.defaults, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class Table:
    """What is known about operations.

    Args:
        rules: how they use their arguments.
        opened: what does the same by simpler operations, in which uses are seen.
    """

    rules: dict[Callable[..., Any], Rule] = field(default_factory=dict)
    opened: dict[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)


@cache
def table() -> Table:
    """That of this process."""
    return Table()


def rule(*functions: Callable[..., Any], keeps_lead: bool = False) -> Callable[[Func], Func]:
    """Register how functions use their parameters: a decorator of what tells.

    That takes the functions' own arguments, each tensor as ``[B, *shape]`` of all samples, and
    returns a form for each argument that may be a parameter, as a function of the cotangents
    ``[K, B, *z]`` of what came out; an empty dict for a call that it does not know. Then the
    parameter is differentiated as ever.

    Args:
        functions: of torch, or :func:`visible` ones of your own; all take the same arguments.
        keeps_lead: their first argument may have any number of dimensions in front, which come
            out as they went in, as with a linear layer. Then all samples are one call of theirs,
            and vmap, which puts them together from simpler operations, is passed by.

    Returns:
        A decorator that returns what it decorates.

    Example:
        A layer of one's own, whose kernel and Jacobians are now made from its factors:

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
        table().rules.update(dict.fromkeys(functions, Rule(forms_of, defaults, keeps_lead)))
        return forms_of

    return register


def opening(*functions: Callable[..., Any]) -> Callable[[Func], Func]:
    """Register a function that does the same by simpler operations, in which uses are seen.

    Args:
        functions: of torch, or :func:`visible` ones; all take the same arguments.

    Returns:
        A decorator that returns what it decorates.

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
        table().opened.update(dict.fromkeys(functions, simpler))
        return simpler

    return register


def visible(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one's own as one operation, which a rule can be registered for.

    Args:
        func: takes tensors; its parameters are looked for among the arguments themselves.

    Returns:
        The same function, seen by whoever overrides torch's functions.

    Example:
        >>> import torch
        >>> from jacfunc.layers import visible
        >>> visible(torch.sin)(torch.zeros(2))
        tensor([0., 0.])
    """

    @wraps(func)
    def seen(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(seen, tensors, *args, **kwargs)
        return func(*args, **kwargs)

    return seen
