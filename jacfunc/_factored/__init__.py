"""The Jacobian of each parameter as factors, which are found where the parameter is used."""

from jacfunc._factored.factored_jacobian import FactoredJacobian
from jacfunc._factored.factoring import LearnedUses, factored
from jacfunc._factored.parts import Part, place_of, rows
from jacfunc._factored.projection import SignMatrix, projected
from jacfunc._factored.squares import SquaredSums, norms, squared, written
