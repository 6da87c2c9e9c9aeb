"""Makes attention use its plain formula, as the fused kernels lack derivatives and vmap rules."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch.backends import mha

_C = torch._C  # torch.backends.cuda wraps each in a Python call, which every sweep would pay

Switches: TypeAlias = tuple[bool, bool, bool, bool, bool]
"""Is each allowed: flash, memory-efficient, cudnn, math, the fast path of whole layers?"""

MATH_ONLY: Switches = (False, False, False, True, False)


class AttentionSwitch:
    """How many evaluations, in all threads, need the math kernel, and the switches before these."""

    def __init__(self) -> None:
        self.count = 0
        self.before = MATH_ONLY


_ENTERED, _LOCK = AttentionSwitch(), Lock()


class MathAttention:
    """A context in which attention uses the math kernel, on every device.

    The fused kernels have no batching rule (torch then loops over the batch), no forward mode and
    no second derivative. The context works as ``sdpa_kernel(MATH)`` does, at a fifth of its cost,
    and also turns off the fused path of whole Transformer layers.

    All threads share torch's switches: the first to enter sets them, the last to leave sets them
    back. If a function sets them itself, that holds until a call inside it, or the last
    evaluation, ends.
    """

    __slots__ = ("_before", "_is_entered", "_is_first")

    def __enter__(self) -> None:
        self._is_entered = not torch.compiler.is_compiling()  # a compiler chooses for itself
        if not self._is_entered:
            return
        with _LOCK:
            self._before = before = _current()
            self._is_first = not _ENTERED.count
            if self._is_first:
                _ENTERED.before = before
            if before != MATH_ONLY:
                _choose(*MATH_ONLY)
            _ENTERED.count += 1

    def __exit__(self, *_: object) -> None:
        if not self._is_entered:
            return
        with _LOCK:
            _ENTERED.count -= 1
            if self._is_first:
                if not _ENTERED.count:
                    _choose(*_ENTERED.before)
            elif self._before != MATH_ONLY:
                _choose(*self._before)
            elif not _ENTERED.count and _current() == MATH_ONLY:  # still as this context set them
                _choose(*_ENTERED.before)


def may_attend(operations: Iterable[Any]) -> bool:
    """May attention be among operations of torch, which names it, and whole layers that use it?"""
    names = [str(getattr(operation, "__name__", "")) for operation in operations]
    return any("attention" in name or "transformer" in name for name in names)


def _current() -> Switches:
    return (
        _C._get_flash_sdp_enabled(),
        _C._get_mem_efficient_sdp_enabled(),
        _C._get_cudnn_sdp_enabled(),
        _C._get_math_sdp_enabled(),
        mha._is_fastpath_enabled,
    )


def _choose(flash: bool, mem_efficient: bool, cudnn: bool, math: bool, fastpath: bool) -> None:
    _C._set_sdp_use_flash(flash)
    _C._set_sdp_use_mem_efficient(mem_efficient)
    _C._set_sdp_use_cudnn(cudnn)
    _C._set_sdp_use_math(math)
    mha._is_fastpath_enabled = fastpath
