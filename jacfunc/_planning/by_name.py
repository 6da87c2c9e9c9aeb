"""The strategy object that a user means by a name and options, or by the object itself."""

from __future__ import annotations

from jacfunc._arguments import check_chunk_size, check_memory
from jacfunc._planning.auto import Auto
from jacfunc._planning.autotune import Autotune
from jacfunc._planning.plan import Direction, check_strategy
from jacfunc._types import Memory
from jacfunc.strategies import Forward, Looped, Reverse, Strategy, Structured

NAMES = ("auto", "autotune", "reverse", "forward", "looped", "structured")


def resolve(
    api: str, strategy: str | Strategy, chunk_size: int | None, memory: Memory = None
) -> Strategy:
    """The strategy; ``chunk_size`` and ``memory`` are options of names alone.

    Raises:
        TypeError, ValueError: an unknown name, no strategy, or options that do not fit.
    """
    check_chunk_size(api, chunk_size)
    budget = check_memory(api, memory)
    if isinstance(strategy, str):
        return _named(api, strategy, chunk_size, budget)
    check_strategy(api, strategy)
    for option, value in (("chunk_size", chunk_size), ("memory", memory)):
        if value is not None:
            raise ValueError(
                f"{api}: {option} must come with a strategy's name, got {value!r} beside "
                f"{strategy!r}. Give it to the object, or name the strategy."
            )
    return strategy


def directed(api: str, direction: Direction, memory: Memory) -> Strategy:
    """The strategy of one direction; in chunks that keep to the budget, where there is one."""
    budget = check_memory(api, memory)
    return direction if budget is None else Auto((direction,), budget)


def _named(api: str, name: str, chunk_size: int | None, budget: int | None) -> Strategy:
    if name not in NAMES:
        raise ValueError(
            f"{api}: strategy must be one of {', '.join(map(repr, NAMES))}, got {name!r}. "
            "Or pass an object, such as Reverse(chunk_size=64)."
        )
    if name == "looped":
        for option, value in (("chunk_size", chunk_size), ("memory", budget)):
            if value is not None:
                raise ValueError(
                    f"{api}: strategy 'looped' must have no {option}, got {value}. "
                    "It sweeps one seed at a time; use 'reverse' or 'forward' to sweep chunks."
                )
        return Looped()
    both = Reverse(chunk_size), Forward(chunk_size)
    if name == "auto":
        return Auto(both, budget, Structured(chunk_size))
    if name == "structured":
        return directed(api, Structured(chunk_size), budget)
    if name == "autotune":
        if chunk_size is not None:
            raise ValueError(
                f"{api}: strategy 'autotune' must have no chunk_size, got {chunk_size}. "
                "It measures which is best; name 'reverse' or 'forward' to choose it."
            )
        return Autotune(memory=budget)
    return directed(api, both[0] if name == "reverse" else both[1], budget)
