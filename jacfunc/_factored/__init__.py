"""The Jacobian of each parameter as factors, which are found where the parameter is used."""

from jacfunc._factored.batches import VmappedBatch, WholeBatch
from jacfunc._factored.derived import Derived
from jacfunc._factored.factored_jacobian import Direct, FactoredJacobian
from jacfunc._factored.factoring import factored, graph_behind, use_recorder
from jacfunc._factored.learned import LearnedUses, users_modes
from jacfunc._factored.parts import NamedParts, Part, as_known, placed, rows, write
from jacfunc._factored.squares import add_squares, norms, place_of, written
from jacfunc._factored.tracked import UNSEEN_WRITE
from jacfunc._factored.tracking import UseRecorder
from jacfunc._factored.use import HOOKING, METADATA, RAW_MEMORY, Use
