"""Calls on the clock, in interleaved rounds; used by benchmarks as well."""

from jacfunc._measuring.clock import Run, is_here, seconds_of, shuffled
from jacfunc._measuring.results import Expected, Result, Spread, WrongAnswerError, spread
from jacfunc._measuring.rounds import Contestant, Effort, measure
