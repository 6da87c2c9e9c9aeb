"""``strategy="autotune"``: measures the candidates once, and remembers the winner."""

from __future__ import annotations

import hashlib
import random
import statistics
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from jacfunc._check import Refused, check_memory
from jacfunc._chunks import Chunk
from jacfunc._fingerprint import fingerprint
from jacfunc._operators import JacobianOperator
from jacfunc._planner import Auto, carry_out, counted_costs
from jacfunc._plans import Plan, attempt, bounded, by_sizes, candidates
from jacfunc._trail import note
from jacfunc._types import Blocks
from jacfunc._winners import Strategies, winners
from jacfunc._words import in_seconds
from jacfunc.strategies import Forward, Reverse

ROUNDS, FEWEST = 9, 3
SECONDS = 1.0
"""That long a tuning goes on with further rounds."""

HOPELESS = 1.5
"""A candidate slower than the best by this factor is out."""

SETTING_UP = 0.1
"""Seconds that a first call may take before it tells of later ones."""

BOTH = (Reverse(), Forward())
REACH = 8
"""Forward mode is measured where inputs are up to so many times the outputs."""


@dataclass(frozen=True)
class Autotune:
    """Measures the candidates on first use, in interleaved rounds, and takes the fastest.

    The winner is remembered for the function's code, the shapes, dtypes and devices of all
    arguments, and the transforms outside: in the process, and in a file where one is named.

    Args:
        cache: a JSON file that keeps winners by machine and versions; None keeps none.
        memory: bytes that a call may take, its result among them, as a number or in words.

    Raises:
        TypeError, ValueError: a budget that is none, a cache file that Autotune did not write.

    Cost:
        On first use three to nine calls of each candidate that is not hopeless.

    Example:
        >>> import torch, jacfunc
        >>> jac = jacfunc.jacobian(torch.sin, strategy=jacfunc.Autotune())
        >>> jac(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    cache: str | Path | None = None
    memory: int | str | None = None
    known: dict[Hashable, tuple[Plan, Chunk]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_memory("Autotune", self.memory)

    def materialize(self, operator: JacobianOperator) -> Blocks:
        """Blocks ``[*out_i, *in_j]`` by the fastest strategy."""
        if torch.compiler.is_compiling():
            return by_sizes(operator, BOTH).materialize(operator)
        signature = operator.signature()
        plan, _ = self.known.get(signature) or (self.plan(operator), None)
        plan, blocks = attempt(plan, lambda plan: carry_out(plan, operator))
        self.known[signature] = plan, None
        return blocks

    def plan(self, operator: JacobianOperator) -> Plan:
        """The winner, measured where it is not known."""
        device = operator.primals[0].device if operator.primals else torch.device("cpu")
        shelf = winners(None if self.cache is None else Path(self.cache).expanduser().resolve())
        about = fingerprint(operator.func), operator.signature()
        key = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
        won = shelf.get(device, key)
        if won is not None and self.memory is None:
            return Plan(won, "it won when it was measured before")
        costs = counted_costs(operator)
        if costs is None:
            return by_sizes(operator, BOTH)
        if won is None:
            times = _measured(operator, list(candidates(costs, BOTH, REACH)))
            won = min(times, key=times.__getitem__)
            shelf.put(device, key, won, times[won])
            note("measured: %s", ", ".join(f"{s} {in_seconds(t)}" for s, t in times.items()))
        plan = Plan(won, "it was the fastest when measured", None, BOTH)
        return bounded(plan, costs, check_memory("Autotune", self.memory))

    def plan_samples(self, operator: JacobianOperator, batch: int) -> tuple[Plan, Chunk]:
        """Samples go as ``"auto"`` sends them; what each does is measured under their vmap."""
        memory = check_memory("Autotune", self.memory)
        _, chunk = Auto(BOTH, memory).plan_samples(operator, batch)
        return Plan(replace(self, memory=None), "measured", None, ()), chunk


def _measured(
    operator: JacobianOperator, strategies: Sequence[Strategies]
) -> dict[Strategies, float]:
    """Median seconds of those that held out to the last round."""
    times: dict[Strategies, list[float]] = {}
    first: dict[Strategies, float] = {}
    for strategy in strategies:  # what torch sets up on first use is nobody's cost
        try:
            first[strategy] = _seconds(operator, strategy)
        except Refused as refusal:
            note("%s was refused: %s", strategy, refusal)
    least = min(first.values())
    # a slow first call may be torch setting something up, unless it is slow by more than that
    times = {s: [] for s, took in first.items() if took <= 3 * least or took <= SETTING_UP}
    order, start = random.Random(0), time.perf_counter()
    for number in range(ROUNDS):
        for strategy in order.sample(list(times), len(times)):
            times[strategy].append(_seconds(operator, strategy))
        least = min(map(min, times.values()))
        times = {s: found for s, found in times.items() if min(found) <= HOPELESS * least}
        if number + 1 >= FEWEST and time.perf_counter() - start > SECONDS:
            break
    operator.repeat_draws()  # as if nothing had been drawn
    return {strategy: statistics.median(found) for strategy, found in times.items()}


def _seconds(operator: JacobianOperator, strategy: Strategies) -> float:
    fresh = operator.again()
    fresh.repeat_draws()
    is_cuda = any(primal.is_cuda for primal in operator.primals)
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    blocks = strategy.materialize(fresh)
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del blocks  # after the clock has stopped
    return seconds
