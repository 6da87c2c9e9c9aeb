"""The choice of parameters: by glob, by predicate, or by a dict of some of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from jacfunc._types import is_differentiable

Select: TypeAlias = (
    str | Sequence[str] | Callable[[str, Tensor], bool] | Mapping[str, Tensor] | None
)
"""A glob or several, ``predicate(name, parameter)``, or parameters by name; None for all."""


def select_params(api: str, params: Mapping[str, Tensor], select: Any) -> dict[str, Tensor]:
    """The selected parameters, in the module's order, with the values to differentiate at.

    A parameter that requires no gradient is chosen only by a dict, which names each.

    Raises:
        TypeError: if it is no choice.
        ValueError: if nothing matches, or if tensors of a dict do not fit.
    """
    if isinstance(select, Mapping):
        return _from_dict(api, params, select)
    trainable = {name: param for name, param in params.items() if param.requires_grad}
    if select is None:
        return trainable
    if callable(select) and not isinstance(select, nn.Module | type):
        matches = {n: param for n, param in trainable.items() if _holds(api, select, n, param)}
        if not matches:
            raise ValueError(
                f"{api}: select must match trainable parameters, got a predicate that holds for "
                f"none of the {len(trainable)}. It is called as predicate(name, parameter)."
            )
        return matches
    patterns = _patterns(api, select)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise ValueError(
                f"{api}: select must match trainable parameters, got {pattern!r}. "
                f"Nearest names: {', '.join(_nearest(pattern, params))}."
            )
    return {n: p for n, p in trainable.items() if any(fnmatchcase(n, pat) for pat in patterns)}


def _holds(api: str, predicate: Callable[..., Any], name: str, param: Tensor) -> bool:
    """Does a predicate hold for a parameter?"""
    try:
        answer = predicate(name, param)
    except TypeError as error:
        if _takes_two(predicate):
            raise
        raise TypeError(
            f"{api}: a predicate must take a name and a parameter, got one that does not: {error}. "
            "It is called as predicate(name, parameter)."
        ) from error
    if isinstance(answer, Tensor) and answer.numel() != 1:
        raise TypeError(
            f"{api}: a predicate must say yes or no to a parameter, got a tensor of shape "
            f"{tuple(answer.shape)}. It is called as predicate(name, parameter)."
        )
    return bool(answer)


def _takes_two(predicate: Callable[..., Any]) -> bool:
    """Can it be called with two arguments, as far as is known?"""
    try:
        inspect.signature(predicate).bind("", None)
    except TypeError:
        return False
    except ValueError:  # of some functions in C nothing is known
        return True
    return True


def _patterns(api: str, select: Any) -> list[str]:
    patterns = [select] if isinstance(select, str) else select
    if isinstance(patterns, Tensor) or not isinstance(patterns, Sequence | Set | Iterator):
        wrong = type(select).__name__
    else:
        patterns = list(patterns)
        wrong = next((type(x).__name__ for x in patterns if not isinstance(x, str)), "")
    if wrong:
        raise TypeError(
            f"{api}: select must be a name or a glob, several of these, a predicate of name and "
            f"parameter, or a dict of tensors by name, got {wrong}. Names are those of "
            "module.named_parameters()."
        )
    if not patterns:
        raise ValueError(
            f"{api}: select must name at least one parameter, got {select!r}. Leave it out to "
            "choose all."
        )
    return list(patterns)


def _from_dict(
    api: str, params: Mapping[str, Tensor], select: Mapping[str, Any]
) -> dict[str, Tensor]:
    for name, value in select.items():
        if name not in params:
            raise ValueError(
                f"{api}: select must name parameters of the module, got {name!r}. "
                f"Nearest names: {', '.join(_nearest(str(name), params))}."
            )
        if not is_differentiable(value) or value.shape != params[name].shape:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            if isinstance(value, Tensor) and not is_differentiable(value):
                what += f" of {value.dtype}"
            raise ValueError(
                f"{api}: select must give floating point tensors in the shapes of the parameters, "
                f"got {what} for {name}, which has {tuple(params[name].shape)}. "
                "Pass a part of dict(module.named_parameters()), or tensors like them."
            )
    if not select:
        raise ValueError(
            f"{api}: select must name at least one parameter, got an empty dict. "
            "Leave it out to choose all."
        )
    return {name: select[name] for name in params if name in select}


def _nearest(pattern: str, params: Mapping[str, Tensor]) -> list[str]:
    return difflib.get_close_matches(pattern, params, n=3) or list(params)[:3]
