"""Traces of functions, simplified and made to run."""

from jacfunc._traces.backends import Backend, Compiler
from jacfunc._traces.divided import Divided, Kept
from jacfunc._traces.executable import Differentiable, Executable, WrittenWork
from jacfunc._traces.traced import traced
