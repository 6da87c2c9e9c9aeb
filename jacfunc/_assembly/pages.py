"""Memory that is written into again: a page that is new costs a fault at the first write."""

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

from jacfunc._memory import LARGE, PeakBytes
from jacfunc._torch import is_outermost

HUGE, POPULATE = 14, 23
"""Linux's ``MADV_HUGEPAGE``, a fault for 2 MiB at once where it has them side by side, and, since
5.14, ``MADV_POPULATE_WRITE``, all faults now rather than at the first write to each page.
"""


class FreedPages:
    """Pages of results that nobody holds any longer: the next results are written into them.

    They are the system's while they wait (``MADV_FREE``): short of memory it takes them back, and
    they read as new. Never more are mapped than results have taken at the same time.

    Args:
        least: bytes of the smallest tensor that is put into such pages.
    """

    def __init__(self, least: int = LARGE) -> None:
        self.least = least
        self._given = 0
        self.most = 0
        self._waiting: list[mmap.mmap] = []
        # a finalizer comes whenever it likes, and may do no more than append
        self._let_go: deque[mmap.mmap] = deque()
        self._lock = Lock()

    @property
    def taken(self) -> int:
        """Bytes that tensors are in."""
        return self._given - sum(map(len, self._let_go))

    @property
    def kept(self) -> int:
        """Bytes that wait."""
        return sum(map(len, (*self._waiting, *self._let_go)))

    def take(self, nbytes: int) -> memoryview:
        """Memory of that size; when the last tensor in it is gone, its pages come back here.

        Raises:
            OSError: there is none.
        """
        with self._lock:
            self._collect()
            found = self._fitting(nbytes)
            given = self._given + (nbytes if found is None else len(found))
            most = max(self.most, given)
            self._keep_to(most - given)  # before new ones come
            pages = _new(nbytes) if found is None else found
            self._given, self.most = given, most
        view = memoryview(pages)[:nbytes]
        weakref.finalize(view, self._give_back, pages).atexit = False
        return view

    def clear(self) -> None:
        """Unmap whatever waits."""
        with self._lock:
            self._collect()
            self._keep_to(0)
            self.most = self._given

    def _collect(self) -> None:
        while self._let_go:
            pages = self._let_go.popleft()
            self._given -= len(pages)
            self._waiting.append(pages)

    def _fitting(self, nbytes: int) -> mmap.mmap | None:
        """The smallest that wait and are large enough, but not twice as large."""
        large_enough = [pages for pages in self._waiting if nbytes <= len(pages) < 2 * nbytes]
        best = min(large_enough, key=len, default=None)
        self._waiting = [pages for pages in self._waiting if pages is not best]
        return best

    def _keep_to(self, most: int) -> None:
        """Unmap what came back longest ago, until no more wait."""
        while self._waiting and sum(map(len, self._waiting)) > most:
            del self._waiting[0]

    def _give_back(self, pages: mmap.mmap) -> None:
        pages.madvise(mmap.MADV_FREE)
        self._let_go.append(pages)


def _new(nbytes: int) -> mmap.mmap:
    """Pages that nothing was written into, large ones, all of them asked for at once."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (HUGE, POPULATE):
        with suppress(OSError):  # systems that can't are slower, that is all
            pages.madvise(advice)
    return pages


PAGES = FreedPages()
"""Those of this process."""


def empty_cache() -> None:
    """Give back to the system what is kept of earlier results, as ``torch.cuda.empty_cache`` does.

    Large results on a CPU (from 32 MiB) are written into pages that earlier ones have left, where
    nobody holds these any longer: writing to a new page takes several times as long. What waits
    is never more than results have taken at the same time, and the system may take it back on its
    own when it is short of memory; this is for who wants to see it free at once.

    Cost:
        No more than a large result's pages being mapped anew.

    Example:
        >>> import torch, jacfunc
        >>> jac = jacfunc.module_jacobian(torch.nn.Linear(1000, 10), per_sample=True, flat=True)
        >>> jac(torch.ones(100, 1000)).nbytes  # nobody holds it
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
) -> Tensor:
    """``like.new_empty``; a large one in pages that earlier results have left, if any wait."""
    dtype = dtype or like.dtype
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < pages.least or torch.device(device or like.device).type != "cpu" or _is_seen(like):
        return like.new_empty(shape, dtype=dtype, device=device)
    try:
        memory = pages.take(nbytes)
    except OSError:  # torch says in its own words that there is none
        return like.new_empty(shape, dtype=dtype, device=device)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, PeakBytes):
            mode.count(storage)
    return like.new_empty(0, dtype=dtype, device=device).set_(storage).resize_(shape)


def _is_seen(like: Tensor) -> bool:
    """Is a tensor more than its memory to somebody, who must see where it comes from?"""
    return (
        type(like) is not Tensor
        or not hasattr(mmap, "MADV_FREE")
        or not is_outermost()
        or not all(isinstance(mode, PeakBytes) for mode in _get_current_dispatch_mode_stack())
    )
