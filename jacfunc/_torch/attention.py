"""Attention by its plain formula: the fused kernels can't be batched, pushed or differentiated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch.backends import mha

_C = torch._C  # torch.backends.cuda is the same with a Python call around each, felt in every sweep

Switches: TypeAlias = tuple[bool, bool, bool, bool, bool]
"""Flash, memory-efficient, cudnn, math, and the fast path of whole layers."""

MATH_ONLY: Switches = (False, False, False, True, False)


class AttentionSwitch:
    """How many evaluations of all threads attend by the plain formula, and what was before."""

    def __init__(self) -> None:
        self.count = 0
        self.before = MATH_ONLY


_ENTERED, _LOCK = AttentionSwitch(), Lock()


class MathAttention:
    """While it is entered, attention takes the math kernel, on every device.

    The fused kernels have no batching rule (torch then loops over the batch), no forward mode and
    no second derivative. The same as ``sdpa_kernel(MATH)``, at a fifth of its cost, which every
    evaluation pays; and without the fused path of whole Transformer layers.

    Torch has these switches once for all threads: whoever enters first turns them, and whoever
    leaves last turns them back. What a function does with them while it is evaluated stays so
    until a call inside it, or the last evaluation, ends.
    """

    __slots__ = ("_is_first", "_seen")

    def __enter__(self) -> None:
        with _LOCK:
            self._seen = seen = _now()
            self._is_first = not _ENTERED.count
            if self._is_first:
                _ENTERED.before = seen
            if seen != MATH_ONLY:
                _choose(*MATH_ONLY)
            _ENTERED.count += 1

    def __exit__(self, *_: object) -> None:
        with _LOCK:
            _ENTERED.count -= 1
            if self._is_first:
                if not _ENTERED.count:
                    _choose(*_ENTERED.before)
            elif self._seen != MATH_ONLY:
                _choose(*self._seen)
            elif not _ENTERED.count and _now() == MATH_ONLY:  # nobody has turned them since
                _choose(*_ENTERED.before)


def math_attention() -> AbstractContextManager[Any]:
    """Compilers choose for themselves."""
    return nullcontext() if torch.compiler.is_compiling() else MathAttention()


def _now() -> Switches:
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
