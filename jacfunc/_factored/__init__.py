"""The Jacobian of each parameter as factors, which are found where the parameter is used."""

from jacfunc._factored.batches import LearnedUses, VmappedBatch, WholeBatch
from jacfunc._factored.factored_jacobian import Direct, FactoredJacobian, Pullbacks
from jacfunc._factored.factoring import factored
from jacfunc._factored.layouts import Evidence, NoLayout, Trace, Unlike, begins, ends
from jacfunc._factored.parts import Part, place_of, rows
from jacfunc._factored.placing import PlainSamples
from jacfunc._factored.squares import SquaredSums, norms, squared, written
