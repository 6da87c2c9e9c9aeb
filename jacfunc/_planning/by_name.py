"""The strategy object that a user means by a name and options, or by the object itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

from jacfunc._arguments import check_chunk_size, check_memory
from jacfunc._planning.auto import Auto
from jacfunc._planning.autotune import Autotune
from jacfunc._planning.plan import DerivativeCompiler, Direction, Plan, check_strategy
from jacfunc._types import Memory
from jacfunc.strategies import (
    Forward,
    Looped,
    Reverse,
    ReverseOverForward,
    Strategy,
    Structured,
)

DoorT = TypeVar("DoorT", bound=Callable[..., Any])
NAMES = ("auto", "autotune", "reverse", "forward", "looped", "structured")
OVER_REVERSE = {f"{name}-over-reverse": name for name in ("reverse", "forward", "looped")}
REVERSE_OVER_FORWARD = "reverse-over-forward"


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
        check_name(api, strategy, NAMES)
        return _named(api, strategy, chunk_size, budget)
    check_strategy(api, strategy)
    if (compiler := compiler_of(strategy)) is not None:
        raise ValueError(
            f"{api}: strategy must be a plan that is not compiled, got one that is, by "
            f"{compiler.backend!r}. Compile a function that calls {api}: "
            "jacfunc.compile(lambda x: …)."
        )
    for option, value in (("chunk_size", chunk_size), ("memory", memory)):
        if value is not None:
            raise ValueError(
                f"{api}: {option} must come with a strategy's name, got {value!r} beside "
                f"{strategy!r}. Give it to the object, or name the strategy."
            )
    return strategy


def compiler_of(strategy: object) -> DerivativeCompiler | None:
    """What compiles derivatives for a strategy, if it is a compiled plan."""
    return strategy.compiler if isinstance(strategy, Plan) else None


def compilable(door: DoorT) -> DoorT:
    """A door whose derivatives are compiled where its strategy is a compiled plan."""

    @wraps(door)
    def opened(*args: Any, **options: Any) -> Any:
        strategy: Any = options.get("strategy")
        compiler = compiler_of(strategy)
        if compiler is None:
            return door(*args, **options)
        return compiler(door(*args, **{**options, "strategy": replace(strategy, compiler=None)}))

    return cast(DoorT, opened)


def resolve_second(
    api: str, strategy: str | Strategy, chunk_size: int | None, memory: Memory = None
) -> Strategy:
    """The strategy of a second derivative: a sweep over reverse mode, or over forward mode.

    Raises:
        TypeError, ValueError: as :func:`resolve`.
    """
    if isinstance(strategy, str):
        check_name(api, strategy, ("auto", *OVER_REVERSE, REVERSE_OVER_FORWARD, *NAMES[1:]))
        check_chunk_size(api, chunk_size)
        if strategy == REVERSE_OVER_FORWARD:
            return directed(api, ReverseOverForward(chunk_size), memory)
        if strategy == "auto":
            ways = Reverse(chunk_size), Forward(chunk_size), ReverseOverForward(chunk_size)
            return Auto(ways, check_memory(api, memory))
        strategy = OVER_REVERSE.get(strategy, strategy)
    return resolve(api, strategy, chunk_size, memory)


def check_name(api: str, name: str, names: Sequence[str]) -> None:
    """Refuse a name that no strategy has."""
    if name not in names:
        raise ValueError(
            f"{api}: strategy must be one of {', '.join(map(repr, names))}, got {name!r}. "
            "Or pass an object, such as Reverse(chunk_size=64)."
        )


def directed(api: str, direction: Direction, memory: Memory) -> Strategy:
    """The strategy of one direction; in chunks that keep to the budget, where there is one."""
    budget = check_memory(api, memory)
    return direction if budget is None else Auto((direction,), budget)


def _named(api: str, name: str, chunk_size: int | None, budget: int | None) -> Strategy:
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
