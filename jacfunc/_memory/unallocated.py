"""What kind a tensor is of, without its numbers."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor


class Unallocated(Tensor):
    """A tensor of the shape, strides, dtype and device of another one, that has no memory.

    Example:
        >>> import torch
        >>> from jacfunc._memory import Unallocated
        >>> kind = Unallocated(torch.ones(2, 3).T)
        >>> kind.shape, kind.stride(), kind.dtype, kind.is_contiguous()
        (torch.Size([3, 2]), (1, 3), torch.float32, False)
    """

    @staticmethod
    def __new__(cls, tensor: Tensor) -> Unallocated:
        how: Any = {"strides": tensor.stride(), "dtype": tensor.dtype, "device": tensor.device}
        kind: Unallocated = Tensor._make_wrapper_subclass(cls, tensor.shape, **how)
        return kind

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise TypeError(f"{func} is asked of a tensor that has no numbers")
