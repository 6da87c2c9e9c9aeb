"""First derivatives that raise an error where somebody differentiates them again."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import Refused
from jacfunc._types import Leaves


def once(products: Leaves, outputs: Leaves, reason: str | None) -> Leaves:
    """The products, as tensors that raise when somebody differentiates them.

    They have no graph, but seem to depend on what an output that requires a gradient depends on.
    Without a reason they are returned as they are.
    """
    if reason is None or not torch.is_grad_enabled():
        return products
    output = next((out for out in outputs if out.requires_grad), outputs[0])
    return tuple([_raising_function(reason).apply(product, output) for product in products])


@cache
def _raising_function(reason: str) -> Any:
    """The identity as an autograd function whose backward pass raises for this reason."""

    class OnceAlone(torch.autograd.Function):
        once_alone = reason

        @staticmethod
        def forward(product: Tensor, output: Tensor) -> Tensor:
            return product.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Nothing is saved."""

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            raise Refused(
                "backward: a Jacobian must not be differentiated where torch has no second "
                f"derivative, got one such ({reason}). Detach the Jacobian."
            )

        @staticmethod
        def vmap(info: Any, in_dims: Any, product: Tensor, output: Tensor) -> Any:
            return OnceAlone.apply(product, output), in_dims[0]

    return OnceAlone
