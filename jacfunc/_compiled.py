"""What torch.compile has compiled, and its originals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Whatever torch.compile would compile runs as it is: under a dispatch mode it breaks.

    A compiler that is not loaded yet, which takes a second, is not loaded for this.
    """
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    try:
        yield
    except BaseException:
        if "torch._dynamo" in sys.modules:  # loaded inside: nobody else's code is forgotten
            torch.compiler.reset()
        raise
