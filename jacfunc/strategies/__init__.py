"""Strategies, which make a Jacobian explicit: each file is one way to sweep a linear map."""

from jacfunc.strategies._evaluation import Evaluation, evaluate, in_words_of, way_out, worded
from jacfunc.strategies._forward import Forward
from jacfunc.strategies._looped import Looped
from jacfunc.strategies._reverse import Reverse
from jacfunc.strategies._second import FirstDerivative, ReverseOverForward, SecondCall
from jacfunc.strategies._settled import SettledFunction
from jacfunc.strategies._strategy import Strategy, Streaming, Sweeping, Sweeps, blocks_into
from jacfunc.strategies._structured import Structured

__all__ = [
    "Evaluation",
    "FirstDerivative",
    "Forward",
    "Looped",
    "Reverse",
    "ReverseOverForward",
    "SecondCall",
    "SettledFunction",
    "Strategy",
    "Streaming",
    "Structured",
    "Sweeping",
    "Sweeps",
    "blocks_into",
    "evaluate",
    "in_words_of",
    "way_out",
    "worded",
]
