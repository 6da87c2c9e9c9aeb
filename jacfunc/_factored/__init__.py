"""The Jacobian of each parameter as factors, which are found where the parameter is used."""

from jacfunc._factored.batches import VmappedBatch, WholeBatch
from jacfunc._factored.factored_jacobian import Direct, FactoredJacobian
from jacfunc._factored.factoring import RepeatedEvaluation, factored
from jacfunc._factored.learned import LearnedUses
from jacfunc._factored.parts import Part, place_of, rows
from jacfunc._factored.squares import add_squares, norms, written
