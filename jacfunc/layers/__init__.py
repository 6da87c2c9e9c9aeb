"""What a use of a parameter means for its Jacobian: one file a family of operations."""

from jacfunc.layers import (  # noqa: F401 (they register their rules)
    _attention,
    _contraction,
    _convolution,
    _elementwise,
    _embedding,
    _linear,
    _normalization,
    _recurrent,
)
from jacfunc.layers._edges import Use
from jacfunc.layers._forms import Form, Gather, Outer, Rows, summed
from jacfunc.layers._gram import Axes, Gram
from jacfunc.layers._linear import positions
from jacfunc.layers._parts import Part, rows, together, write
from jacfunc.layers._rules import opening, rule, visible
from jacfunc.layers._squares import Sums, norms, squared, written
from jacfunc.layers._tracked import Touched
from jacfunc.layers._uses import Uses

__all__ = [
    "Axes",
    "Form",
    "Gather",
    "Gram",
    "Outer",
    "Part",
    "Rows",
    "Sums",
    "Touched",
    "Use",
    "Uses",
    "norms",
    "opening",
    "positions",
    "rows",
    "rule",
    "squared",
    "summed",
    "together",
    "visible",
    "write",
    "written",
]
