"""Calls on the clock, in interleaved rounds; used by benchmarks as well."""

from jacfunc._measuring.clock import Run, interleaved, is_here, peak_bytes, seconds_of
from jacfunc._measuring.results import (
    WARM_UP,
    Expected,
    Result,
    Spread,
    WrongAnswerError,
    counted,
    pooled,
    recording,
    spread,
)
from jacfunc._measuring.rounds import Check, Contestant, Effort, Entry, measure
