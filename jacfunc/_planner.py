"""Which strategy, and why: above the strategies it picks from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from jacfunc._basis import numel
from jacfunc._check import Refused, check_chunk_size
from jacfunc._operators import JacobianOperator
from jacfunc._types import Blocks
from jacfunc.strategies import Forward, Looped, Reverse, Strategy

_log = logging.getLogger("jacfunc")

# Measured against the plain graph of an MLP: forward wins only where outputs far outnumber inputs.
FORWARD_FROM_RATIO = 4


@dataclass(frozen=True)
class Plan:
    """A strategy, and the reason in words."""

    strategy: Strategy
    reason: str


@dataclass(frozen=True)
class Auto:
    """Chooses by sizes, and takes the next strategy where torch refuses the first."""

    chunk_size: int | None = None

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` from the first plan that torch carries out."""
        operator.repeat_draws()
        *first, last = self.plans(operator)
        for plan in first:
            try:
                blocks = plan.strategy.materialize(operator)
            except Refused as refusal:
                _say("%s refused: %s", plan.strategy, refusal)
                continue
            _say("%s ran: %s", plan.strategy, plan.reason)
            return blocks
        _say("%s runs: %s", last.strategy, last.reason)
        return last.strategy.materialize(operator)

    def plans(self, operator: JacobianOperator) -> Sequence[Plan]:
        """What to try, in order, each with its reason."""
        rows, columns = numel(operator.outputs), numel(operator.primals)
        if rows <= FORWARD_FROM_RATIO * columns:
            reason = f"{rows} outputs are not far more than {columns} inputs"
            return (Plan(Reverse(self.chunk_size), f"{reason}: rows cost least"),)
        reason = f"{rows} outputs are more than {FORWARD_FROM_RATIO} times the {columns} inputs"
        return (
            Plan(Forward(self.chunk_size), f"{reason}: columns cost least"),
            Plan(Reverse(self.chunk_size), "torch has no right forward mode for this function"),
        )


def _say(message: str, *facts: object) -> None:
    if not torch.compiler.is_compiling():  # which can't trace a logger
        _log.info(message, *facts)


_CHUNKED: dict[str, Callable[[int | None], Strategy]] = {
    "auto": Auto,
    "reverse": Reverse,
    "forward": Forward,
}


def resolve(api: str, strategy: str | Strategy, chunk_size: int | None) -> Strategy:
    """A strategy object from what the user gave: a name with a chunk size, or the object itself."""
    check_chunk_size(api, chunk_size)
    if isinstance(strategy, str):
        if strategy not in (*_CHUNKED, "looped"):
            names = ", ".join(map(repr, (*_CHUNKED, "looped")))
            raise ValueError(
                f"{api}: strategy must be one of {names}, got {strategy!r}. "
                "Or pass an object, such as Reverse(chunk_size=64)."
            )
        if strategy == "looped" and chunk_size is not None:
            raise ValueError(
                f"{api}: strategy 'looped' must have no chunk_size, got {chunk_size}. "
                "It sweeps one seed at a time; use 'reverse' or 'forward' to sweep chunks."
            )
        return Looped() if strategy == "looped" else _CHUNKED[strategy](chunk_size)
    if isinstance(strategy, type) or not isinstance(strategy, Strategy):
        raise TypeError(
            f"{api}: strategy must be a name or an object with materialize(operator), "
            f"got {strategy!r}. Try Reverse(), Forward() or Looped()."
        )
    if chunk_size is not None:
        raise ValueError(
            f"{api}: chunk_size must come with a strategy's name, got {chunk_size} beside "
            f"{strategy!r}. Give the chunk to the object: replace(strategy, chunk_size=...)."
        )
    return strategy
