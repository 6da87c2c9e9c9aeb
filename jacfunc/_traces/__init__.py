"""Traces of functions, simplified and made to run."""

from jacfunc._traces.backends import Backend, Compiler
from jacfunc._traces.divided import Divided, Kept
from jacfunc._traces.executable import Differentiable, Executable
from jacfunc._traces.tape import written_down
from jacfunc._traces.traced import traced
from jacfunc._traces.written import WrittenWork
