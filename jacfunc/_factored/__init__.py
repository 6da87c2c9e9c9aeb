"""A parameter's Jacobian as factors, found where the parameter is used."""

from jacfunc._factored.factored_jacobian import Factors
from jacfunc._factored.factoring import Met, factored
from jacfunc._factored.parts import Part, rows, together, write
from jacfunc._factored.projection import Signs, projected
from jacfunc._factored.squares import Sums, norms, squared, written
from jacfunc._factored.tracked import Touched
from jacfunc._factored.tracking import Uses
from jacfunc._factored.use import Use
