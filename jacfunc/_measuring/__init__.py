"""Calls on the clock, in interleaved rounds, or one in turn; the benchmarks use it, too."""

from jacfunc._measuring.clock import Run, interleaved, is_here, peak_bytes, seconds_of, shuffled
from jacfunc._measuring.results import (
    Result,
    Spread,
    WrongAnswerError,
    counted,
    failures_in,
    pooled,
    spread_of,
)
from jacfunc._measuring.rounds import Check, Contestant, Effort, Entry, measure
from jacfunc._measuring.turns import ROUNDS, InTurn
