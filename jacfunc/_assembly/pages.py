"""Pages of memory that large results are written into again, as each new page costs a fault."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from jacfunc._arguments import are_plain
from jacfunc._memory import PAGED_BYTES, PeakBytes
from jacfunc._torch import is_outermost

HUGE_BYTES = 2**21
HUGE, POPULATE = 14, 23
"""What Linux is advised about new pages: ``MADV_HUGEPAGE``, to take one fault for 2 MiB, and, since
5.14, ``MADV_POPULATE_WRITE``, to take all faults at once instead of one at the first write to each.
"""


class FreedPages:
    """Pages of results that are no longer referenced, kept for the next results.

    While pages wait, the system may take them back (``MADV_FREE``) when it is short of memory; they
    then read as new. Never more pages are mapped than results have filled at the same time.

    Args:
        least: bytes of the smallest tensor that is put into such pages.
    """

    def __init__(self, least: int = PAGED_BYTES) -> None:
        self.least = least
        self._lent_bytes = 0
        self.most_bytes = 0
        """The most bytes that tensors have taken at the same time."""
        self._waiting: list[mmap.mmap] = []
        # a finalizer runs at any time, in any thread, and may do no more than append
        self._returned: deque[mmap.mmap] = deque()
        self._lock = Lock()

    @property
    def bytes_in_use(self) -> int:
        """Bytes that tensors take now."""
        return self._lent_bytes - sum(map(len, self._returned))

    @property
    def bytes_waiting(self) -> int:
        """Bytes that wait for the next results."""
        return sum(map(len, (*self._waiting, *self._returned)))

    def take(self, nbytes: int) -> memoryview:
        """Memory of that size, whose pages come back here when its last tensor is gone.

        Raises:
            OSError: if there is no memory.
        """
        with self._lock:
            self._collect()
            pages = self._fitting(nbytes)
            lent = self._lent_bytes + (nbytes if pages is None else len(pages))
            most = max(self.most_bytes, lent)
            self._keep_to(most - lent)  # before new pages are mapped
            pages = _new_pages(nbytes) if pages is None else pages
            self._lent_bytes, self.most_bytes = lent, most
        view = memoryview(pages)[:nbytes]
        weakref.finalize(view, self._give_back, pages).atexit = False
        return view

    def clear(self) -> None:
        """Unmap all pages that wait."""
        with self._lock:
            self._collect()
            self._keep_to(0)
            self.most_bytes = self._lent_bytes

    def _collect(self) -> None:
        """Let pages wait that finalizers have returned."""
        while self._returned:
            pages = self._returned.popleft()
            self._lent_bytes -= len(pages)
            self._waiting.append(pages)

    def _fitting(self, nbytes: int) -> mmap.mmap | None:
        """The smallest waiting pages that are large enough, but not twice as large."""
        large_enough = [pages for pages in self._waiting if nbytes <= len(pages) < 2 * nbytes]
        best = min(large_enough, key=len, default=None)
        self._waiting = [pages for pages in self._waiting if pages is not best]
        return best

    def _keep_to(self, most: int) -> None:
        """Unmap pages, those that came back first, until at most so many bytes wait."""
        while self._waiting and sum(map(len, self._waiting)) > most:
            del self._waiting[0]

    def _give_back(self, pages: mmap.mmap) -> None:
        pages.madvise(mmap.MADV_FREE)
        self._returned.append(pages)


def _new_pages(nbytes: int) -> mmap.mmap:
    """New pages, large ones if the system has such, with all faults taken now.

    Linux lets memory begin where a large page does if its size is a multiple of theirs. So it is
    mapped with such a size, and cut.
    """
    whole = -(-nbytes // HUGE_BYTES) * HUGE_BYTES
    pages = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(SystemError):  # where the system can't, it maps a little more
        pages.resize(nbytes)
    for advice in (HUGE, POPULATE):
        with suppress(OSError):  # a system without it is slower, nothing else
            pages.madvise(advice)
    return pages


PAGES = FreedPages()
"""The freed pages of this process."""


def empty_cache() -> None:
    """Give memory of earlier results back to the system, as ``torch.cuda.empty_cache`` does.

    On a CPU, tensors of results from 4 MiB on are written into pages of earlier results no longer
    used, as a write to a new page takes several times as long. The pages that wait are never more
    than results have taken at the same time. The system takes them back when it is short of memory;
    this function gives them back at once.

    Cost:
        No more than a large result's pages being mapped anew.

    Example:
        >>> import torch, jacfunc
        >>> jac = jacfunc.module_jacobian(torch.nn.Linear(1000, 10), per_sample=True, flat=True)
        >>> jac(torch.ones(100, 1000)).nbytes  # it is dropped at once
        40040000
        >>> jacfunc.empty_cache()
    """
    PAGES.clear()


def empty(
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    pages: FreedPages = PAGES,
    least: int | None = None,
) -> Tensor:
    """``like.new_empty(shape)``; a large one is put into pages of earlier results, if any wait.

    It is large from ``least`` bytes on, by default from those that the pages say.
    """
    dtype = dtype or like.dtype
    nbytes = math.prod(shape) * dtype.itemsize
    if (
        nbytes < (pages.least if least is None else least)
        or torch.device(device or like.device).type != "cpu"
        or _is_watched(like)
    ):
        return like.new_empty(shape, dtype=dtype, device=device)
    try:
        memory = pages.take(nbytes)
    except OSError:  # torch raises its own error if there is no memory
        return like.new_empty(shape, dtype=dtype, device=device)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, PeakBytes):
            mode.count(storage)
    return like.new_empty(0, dtype=dtype, device=device).set_(storage).resize_(shape)


def _is_watched(like: Tensor) -> bool:
    """Must torch allocate a tensor like this, for a subclass, transform or mode to see it?"""
    return (
        not are_plain((like,))
        or not hasattr(mmap, "MADV_FREE")
        or not is_outermost()
        or not all(isinstance(mode, PeakBytes) for mode in _get_current_dispatch_mode_stack())
    )
