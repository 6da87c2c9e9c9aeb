"""Attention by its plain formula: the fused kernels can't be batched, pushed or differentiated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.backends import mha

_C = torch._C  # torch.backends.cuda is the same with a Python call around each, felt in every sweep


class PlainAttention:
    """While it is entered, attention takes the math kernel, on every device.

    The fused kernels have no batching rule (torch then loops over the batch), no forward mode and
    no second derivative. The same as ``sdpa_kernel(MATH)``, at a tenth of its cost, which every
    evaluation pays; and without the fused path of whole Transformer layers.
    """

    def __enter__(self) -> None:
        self._before = (
            _C._get_flash_sdp_enabled(),
            _C._get_mem_efficient_sdp_enabled(),
            _C._get_cudnn_sdp_enabled(),
            _C._get_math_sdp_enabled(),
            mha._is_fastpath_enabled,
        )
        _choose(False, False, False, True, False)

    def __exit__(self, *_: object) -> None:
        _choose(*self._before)


def plain_attention() -> AbstractContextManager[Any]:
    """Compilers choose for themselves."""
    return nullcontext() if torch.compiler.is_compiling() else PlainAttention()


def _choose(flash: bool, mem_efficient: bool, cudnn: bool, math: bool, fastpath: bool) -> None:
    _C._set_sdp_use_flash(flash)
    _C._set_sdp_use_mem_efficient(mem_efficient)
    _C._set_sdp_use_cudnn(cudnn)
    _C._set_sdp_use_math(math)
    mha._is_fastpath_enabled = fastpath
