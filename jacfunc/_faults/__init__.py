"""Tables of torch's faults, and the watch that looks up in them what a function calls."""

from jacfunc._faults.backward import (
    LOST_OUTSIDE,
    PullbackRules,
    can_be_batched,
    can_be_pushed,
    check_nodes,
    check_statistics,
    must_be_differentiable,
    pullback_rules,
    suspects,
    wrong_second_derivative,
)
from jacfunc._faults.callers import TAKES_DERIVATIVES
from jacfunc._faults.formulas import formula_of
from jacfunc._faults.forward import ForwardWatch, PushContext
from jacfunc._faults.kernels import Norm
from jacfunc._faults.lookups import apart
from jacfunc._faults.nested import (
    NestedWatch,
    check_stays_in_torch,
    is_unwatched,
    note_unwatched,
    runs_alone,
    watched_once,
)
from jacfunc._faults.operations import FREEZING
from jacfunc._faults.torchscript import check_scripted
from jacfunc._faults.watch import Watch, handled, is_watching
