"""Attention by its plain formula: the fused kernels can't be batched, pushed or differentiated."""

from __future__ import annotations

from torch.backends import cuda as kernels
from torch.backends import mha


class PlainAttention:
    """While it is entered, attention takes the math kernel, on every device.

    The fused kernels have no batching rule (torch then loops over the batch), no forward mode and
    no second derivative. The same as ``sdpa_kernel(MATH)``, at a tenth of its cost, which every
    evaluation pays; and without the fused path of whole Transformer layers.
    """

    def __enter__(self) -> None:
        self._before = (
            kernels.flash_sdp_enabled(),
            kernels.mem_efficient_sdp_enabled(),
            kernels.cudnn_sdp_enabled(),
            kernels.math_sdp_enabled(),
            mha.get_fastpath_enabled(),
        )
        _choose(False, False, False, True, False)

    def __exit__(self, *_: object) -> None:
        _choose(*self._before)


def _choose(flash: bool, mem_efficient: bool, cudnn: bool, math: bool, fastpath: bool) -> None:
    kernels.enable_flash_sdp(flash)
    kernels.enable_mem_efficient_sdp(mem_efficient)
    kernels.enable_cudnn_sdp(cudnn)
    kernels.enable_math_sdp(math)
    mha.set_fastpath_enabled(fastpath)
