"""Activations with which a network does not run under ``vmap`` over samples."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint


class _ByNumpy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.from_numpy(x.detach().numpy().clip(0))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, back: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return torch.from_numpy(back.numpy() * (y.numpy() > 0))


class _OldStyle(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, back: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return back * (x > 0)


class ByNumpy(nn.Module):
    """NumPy computes it, forward and backward."""

    def forward(self, x: Tensor) -> Any:
        return _ByNumpy.apply(x)


class OldStyle(nn.Module):
    """A function whose forward takes a context, as all did before ``setup_context``."""

    def forward(self, x: Tensor) -> Any:
        return _OldStyle.apply(x)


class Masked(nn.Module):
    """A mask that is looked at, for nothing is to be done where it hides nothing."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        return x if mask.all() else x * mask


class Checkpointed(nn.Module):
    """Computed again in the backward pass, by the checkpoint that is not reentrant."""

    def forward(self, x: Tensor) -> Any:
        return checkpoint(torch.relu, x, use_reentrant=False)


ACTIVATIONS = {
    "numpy": ByNumpy,
    "mask": Masked,
    "old function": OldStyle,
    "checkpoint": Checkpointed,
}
