"""What importing jacfunc brings with it, beside torch: counted in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import gc, sys, threading
import torch
from torch.utils._python_dispatch import TorchDispatchMode

operations = []

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operations.append(str(func))
        return func(*args, **(kwargs or {}))

def state():
    return gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), threading.active_count()

before, states = set(sys.modules), state()
with Count():
    import jacfunc
assert state() == states, state()
assert not operations, operations
print(*sorted(set(sys.modules) - before))
"""

OF_TORCH = {"torch.utils.flop_counter", "torch.utils.module_tracker"}
"""The table of formulas that costs are counted by."""


def test_importing_jacfunc_imports_its_own_files_and_optree_alone() -> None:
    """Torch's compiler, SciPy and what draws and prints would take up to seconds.

    No operation runs either, no thread starts, and the garbage collector is left as it was.
    """
    run = [sys.executable, "-c", CODE]
    root = Path(__file__).parents[2]
    told = subprocess.run(run, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    ours = {"jacfunc", "optree", *sys.stdlib_module_names}
    assert "jacfunc" in told
    assert {name for name in told if name.split(".")[0] not in ours} <= OF_TORCH
