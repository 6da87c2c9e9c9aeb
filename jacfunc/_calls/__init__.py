"""A user's call without its trees, and what tells one function from another."""

from jacfunc._calls.at_all import at_all
from jacfunc._calls.code import (
    home_of,
    is_installed,
    is_ours,
    places_of,
    reads_by_text,
    reads_unnamed,
)
from jacfunc._calls.derivation import Derivation, ModuleOrigin, OfCalls
from jacfunc._calls.fingerprint import fingerprint
from jacfunc._calls.flat_call import FlatCall
from jacfunc._calls.followed import CUT_OFF, warn_if_followed
from jacfunc._calls.one_tensor import BARE, OneTensor
from jacfunc._calls.reach import modules_of, reaches_module
