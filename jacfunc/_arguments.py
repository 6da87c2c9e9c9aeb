"""Checks of arguments; messages read ``{api}: {what must hold}, got {what came}. {What to do}.``"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, get_args

import torch

from jacfunc._errors import Refused
from jacfunc._types import Argnums, Randomness, is_differentiable

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

_RANDOMNESS = get_args(Randomness)


def check_plain(tensors: Collection[torch.Tensor]) -> None:
    """Refuse subclasses of tensors that torch's transforms would treat as plain tensors.

    Transforms wrap tensors, and the wrapper does not have the class of the wrapped one.

    Raises:
        Refused: if a class has a ``__torch_function__`` of its own.
    """
    if are_plain(tensors):
        return
    for tensor in tensors:
        if means_more(type(tensor)):
            raise Refused(
                f"torch's transforms pass by the __torch_function__ of {type(tensor).__name__}"
            )


def are_plain(tensors: Collection[torch.Tensor]) -> bool:
    """Has none a class of its own?"""
    return _PLAIN.issuperset(map(type, tensors))


def check_kept(tensors: Collection[torch.Tensor], copies: Collection[torch.Tensor]) -> None:
    """Refuse copies that are no longer of the tensor's class, if that has behaviour of its own.

    Raises:
        Refused: if a copy lacks the ``__torch_function__`` of its original.
    """
    if are_plain(tensors):
        return
    for tensor, copy in zip(tensors, copies, strict=True):
        kind = type(tensor)
        if kind is not type(copy) and means_more(kind):
            raise Refused(
                f"a copy of {type(tensor).__name__} is no longer one, and would pass by its "
                "__torch_function__"
            )


def means_more(kind: Any) -> bool:
    """Does a class of tensors have a ``__torch_function__`` of its own?"""
    base: Any = torch.Tensor
    plain = (base.__torch_function__.__func__, torch.nn.Parameter.__torch_function__)
    override = kind.__torch_function__
    return getattr(override, "__func__", override) not in plain


def check_func(api: str, func: object) -> None:
    """Refuse what can't be called."""
    if not callable(func):
        must = f"func must be callable, got {_kind(func)}"
        raise TypeError(f"{api}: {must}. Pass a function of tensors, or a module.")


def check_flags(api: str, **flags: object) -> None:
    """Refuse what is neither True nor False, though Python would take it for one of them."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            must = f"{name} must be True or False, got {flag!r}"
            raise TypeError(f"{api}: {must}. Write {name}=True, or {name}=False.")


def check_randomness(api: str, randomness: object, advice: str) -> None:
    """Refuse another word than those that vmap knows."""
    if not isinstance(randomness, str) or randomness not in _RANDOMNESS:
        must = f"randomness must be 'error', 'same' or 'different', got {randomness!r}"
        raise ValueError(f"{api}: {must}. {advice}")


def wrap_argnums(api: str, argnums: Argnums, num_args: int) -> tuple[int, ...]:
    """Positions in ``range(num_args)`` for ``argnums``, of which negative ones count from the end.

    Raises:
        TypeError, ValueError: if they are no positions, or name an argument twice.
    """
    if type(argnums) is int and -num_args <= argnums < num_args:
        return (argnums % num_args,)
    positions = argnums if isinstance(argnums, tuple) else (argnums,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in positions):
        raise TypeError(
            f"{api}: argnums must be an int or a tuple of ints, got {argnums!r}. "
            "Name positional arguments by their position."
        )
    if not positions:
        raise ValueError(
            f"{api}: argnums must name at least one argument, got (). Pass an int or a tuple."
        )
    for n in positions:
        if not -num_args <= n < num_args:
            raise ValueError(
                f"{api}: argnums must be positions among the {num_args} positional arguments, "
                f"got {n}. Pass the argument by position, or choose another argnums."
            )
    wrapped = tuple(n % num_args for n in positions)
    if len(set(wrapped)) != len(wrapped):
        raise ValueError(
            f"{api}: argnums must be unique, got {argnums!r}. Name each argument once; "
            "a negative number counts from the end."
        )
    return wrapped


def whole(api: str, name: str, value: object, advice: str, must: str = "an int") -> int:
    """The value, a whole number; True and False are none, though Python takes them for ints."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{api}: {name} must be {must}, got {type(value).__name__}. {advice}")
    return value


def check_chunk_size(api: str, chunk_size: object) -> None:
    """Refuse all but a positive number of seeds, and None for all at once."""
    if chunk_size is None:
        return
    advice = "It counts the seeds that are swept at once."
    if whole(api, "chunk_size", chunk_size, advice, "an int or None") < 1:
        raise ValueError(
            f"{api}: chunk_size must be at least 1, got {chunk_size}. Pass None to sweep all."
        )


def check_memory(api: str, memory: object) -> int | None:
    """The budget in bytes, from a number or from words such as ``"2 GiB"``; None without one."""
    if memory is None:
        return None
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise TypeError(
            f"{api}: memory must be a number of bytes, a string or None, "
            f"got {type(memory).__name__}. Write 2**31 or '2 GiB'."
        )
    budget = memory if isinstance(memory, int) else _parsed_bytes(memory)
    if budget is None or budget < 1:
        raise ValueError(
            f"{api}: memory must be a positive number of bytes, got {memory!r}. "
            "Write 2**31, '2 GiB' or '500 MB'."
        )
    return budget


def _parsed_bytes(words: str) -> int | None:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", words, re.IGNORECASE)
    if match is None:
        return None
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def check_inputs(
    api: str, argnum: int, leaves: Sequence[Any], paths: Callable[[], Sequence[str]]
) -> None:
    """Refuse complex and sparse leaves, and an argument with leaves of which none is floating."""
    for place, leaf in enumerate(leaves):
        if is_differentiable(leaf) and leaf.layout is not torch.strided:
            raise NotImplementedError(
                f"{api}: inputs must be dense, got {leaf.layout} at {paths()[place]}. "
                "Differentiate by its values, of which the function makes the sparse tensor."
            )
        if isinstance(leaf, torch.Tensor) and leaf.is_complex():
            raise NotImplementedError(
                f"{api}: inputs must be real, got {leaf.dtype} at {paths()[place]}. Differentiate "
                "`lambda z: f(torch.view_as_complex(z))` at `torch.view_as_real(z)` instead."
            )
    if leaves and not any(is_differentiable(leaf) for leaf in leaves):
        kinds = ", ".join(sorted({_kind(leaf) for leaf in leaves}))
        raise TypeError(
            f"{api}: argument {argnum} must hold at least one floating point tensor to "
            f"differentiate, got {kinds}. Convert it with "
            "torch.as_tensor(..., dtype=torch.float64), or choose another argnums."
        )


def check_outputs(api: str, leaves: Sequence[Any], paths: Callable[[], Sequence[str]]) -> None:
    """Refuse outputs that are no tensors or complex, those of which none is floating, and None."""
    if not leaves:  # it is None: nothing else without leaves comes here
        raise TypeError(
            f"{api}: func must return tensors, got None. Return what it computes, or an empty "
            "tuple if that is nothing."
        )
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(
                f"{api}: func must return tensors, got {_kind(leaf)} at {paths()[place]}. "
                "Return anything else beside them with has_aux=True."
            )
        if leaf.is_complex():
            raise NotImplementedError(
                f"{api}: outputs must be real, got {leaf.dtype} at {paths()[place]}. "
                "Return torch.view_as_real(...) of it instead."
            )
    if not any(map(is_differentiable, leaves)):
        kinds = ", ".join(sorted({_kind(leaf) for leaf in leaves}))
        raise TypeError(
            f"{api}: func must return at least one floating point tensor, got {kinds}. "
            "Integers and booleans have no derivative."
        )


def check_aux_pair(api: str, returned: object) -> tuple[Any, Any]:
    """The pair ``(output, aux)``, which a function with ``has_aux=True`` must return."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        kind = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else _kind(returned)
        raise TypeError(
            f"{api}: with has_aux=True func must return (output, aux), got {kind}. "
            "Pack everything that is not differentiated into one aux."
        )
    return returned


def check_like(api: str, name: str, seeds: Sequence[Any], leaves: Sequence[torch.Tensor]) -> None:
    """Refuse seeds that differ from the primals, or outputs, in number, shape or dtype."""
    if len(seeds) != len(leaves):
        raise ValueError(
            f"{api}: {name} must have {len(leaves)} tensor leaves, got {len(seeds)}. "
            f"Give {name} the same structure as what they belong to."
        )
    for position, (seed, like) in enumerate(zip(seeds, leaves, strict=True)):
        if not isinstance(seed, torch.Tensor) or seed.shape != like.shape:
            raise ValueError(
                f"{api}: {name} must match in shape, leaf {position} being {tuple(like.shape)}, "
                f"got {tuple(seed.shape) if isinstance(seed, torch.Tensor) else _kind(seed)}. "
                f"Reshape or expand it."
            )
        if seed.dtype != like.dtype:
            raise TypeError(
                f"{api}: {name} must match in dtype, leaf {position} being {like.dtype}, "
                f"got {seed.dtype}. Convert it with .to({like.dtype})."
            )


def _kind(leaf: object) -> str:
    """The dtype of a tensor, or the type of any other leaf, for messages."""
    return str(leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
