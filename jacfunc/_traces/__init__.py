"""Traces of functions, simplified and made to run."""

from jacfunc._traces.backends import Backend, Compiler
from jacfunc._traces.divided import Divided, Kept
from jacfunc._traces.executable import (
    FEWEST_CALLS,
    MOST_MISSES,
    Differentiable,
    Executable,
    WrittenWork,
)
from jacfunc._traces.saved import MOST_BYTES, Sources, fingerprint, outline
from jacfunc._traces.steps import can_take_rows, own_nodes, taking_rows
from jacfunc._traces.traced import traced
