"""Derivatives compiled: traced once for each kind of call, guarded, and run without Python."""

from jacfunc._compiled.compile import compile
from jacfunc._compiled.compiled import Compiled
