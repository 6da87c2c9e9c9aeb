"""Which strategy, for my model, on my hardware? ``python -m jacfunc compare module:function``.

Needs the extra ``bench``. The benchmark suite of the repository measures with the same parts.
"""

from jacfunc.compare._command import main
from jacfunc.compare._compare import compare
from jacfunc.compare._problem import Problem
from jacfunc.compare._table import Comparison

__all__ = ["Comparison", "Problem", "compare", "main"]
