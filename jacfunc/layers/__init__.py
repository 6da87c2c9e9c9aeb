"""Rules that say, for each operation, what a parameter's Jacobian is made of where it is used."""

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
from jacfunc.layers._forms import Form, Gather, Outer, Rows, summed
from jacfunc.layers._linear import positions
from jacfunc.layers._rules import FormOf, Rule, opening, rule, table, visible

__all__ = [
    "Form",
    "FormOf",
    "Gather",
    "Outer",
    "Rows",
    "Rule",
    "opening",
    "positions",
    "rule",
    "summed",
    "table",
    "visible",
]
