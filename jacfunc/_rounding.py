"""Numbers that may differ by rounding, and products that must not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


def are_near(numbers: Tensor, others: Tensor, power: float | None, lead: int = 0) -> bool:
    """Are tensors of one shape equal, or apart by less than this power of the dtype's precision?

    The difference is relative to the largest finite number; for each index of the first ``lead``
    dimensions to that of its own. A nan is near a nan. With None for the power, all other numbers
    must be equal.
    """
    if torch.equal(numbers, others):
        return True
    is_near = (numbers == others) | (numbers.isnan() & others.isnan())
    if power is not None:
        sizes = torch.where(numbers.isfinite(), numbers, 0).abs()
        scale = sizes.reshape(*sizes.shape[:lead], -1).amax(-1)
        scale = scale.reshape(scale.shape + (1,) * (sizes.dim() - lead))
        is_near |= (numbers - others).abs() <= scale * torch.finfo(numbers.dtype).eps ** power
    return bool(is_near.all())


@contextmanager
def contracting(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Around products of factors on these tensors' devices: no graph, no autocast, which rounds."""
    with torch.no_grad(), ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, {x.device.type for x in tensors}):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
