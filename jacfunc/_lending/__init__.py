"""A module lent for a call and for its evaluations, and left as it was."""

from jacfunc._lending.constants import Constants, versions_of
from jacfunc._lending.current import CurrentState, check_outermost
from jacfunc._lending.originals import Captured, Revisits
from jacfunc._lending.part import are_same
from jacfunc._lending.select import Select
from jacfunc._lending.snapshot import Snapshot, Version, version_of_loss
from jacfunc._lending.state import ModuleState
