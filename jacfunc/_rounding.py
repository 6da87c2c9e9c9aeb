"""Numbers that may differ by rounding, and products that must not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from math import log

import torch
from torch import Tensor

ROUNDING = 0.5
"""Two ways to one answer differ by less than this power of the precision."""

NOISE = 64.0
"""Units of the precision that may be left where terms cancel."""


def agree(
    outputs: Iterable[Tensor], others: Iterable[Tensor], dtypes: Iterable[torch.dtype] = ()
) -> bool:
    """Are these the same numbers, computed in two ways?

    Args:
        dtypes: of what they were made of, which may have been rounded more than they are.
    """
    coarsest = max([torch.finfo(x).eps for x in dtypes if x.is_floating_point], default=0.0)
    return all(map(partial(_agree, coarsest), outputs, others))


def _agree(coarsest: float, out: Tensor, other: Tensor) -> bool:
    out = out.detach()
    if out.shape != other.shape:
        return False
    if not out.is_floating_point():
        return are_near(out, other, None)
    # both may be zero but for rounding, as where terms of the size of one cancel
    own = torch.finfo(out.dtype).eps
    eps = max(own, coarsest)
    is_noise = bool(out.abs().le(NOISE * eps).all() and other.abs().le(NOISE * eps).all())
    return is_noise or are_near(out, other, ROUNDING * log(eps, own))


def are_near(numbers: Tensor, others: Tensor, power: float | None, lead: int = 0) -> bool:
    """Are tensors of one shape equal, or apart by less than this power of the dtype's precision?

    The difference is relative to the largest finite number; for each index of the first ``lead``
    dimensions to that of its own. A nan is near a nan. With None for the power, all other numbers
    must be equal.
    """
    if torch.equal(numbers, others):
        return True
    if power is not None:  # most are so: for these it takes half as many operations
        tolerance = torch.finfo(numbers.dtype).eps ** power
        sizes, apart = [_largest(x, lead) for x in (numbers, numbers - others)]
        if bool((apart < sizes * tolerance).all()):  # not so where one is nan, or both are infinite
            return True
    is_near = (numbers == others) | (numbers.isnan() & others.isnan())
    if power is not None:
        sizes = torch.where(numbers.isfinite(), numbers, 0).abs()
        scale = sizes.reshape(*sizes.shape[:lead], -1).amax(-1)
        scale = scale.reshape(scale.shape + (1,) * (sizes.dim() - lead))
        is_near |= (numbers - others).abs() <= scale * tolerance
    return bool(is_near.all())


def _largest(numbers: Tensor, lead: int) -> Tensor:
    """The largest number for each index of so many dimensions; nan where there is one."""
    rows = numbers.reshape(*numbers.shape[:lead], -1)
    largest: Tensor = torch.linalg.vector_norm(rows, torch.inf, -1)
    return largest


def contracting(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Around products of factors on these tensors' devices: no graph, no autocast, which rounds."""
    rounding = [*filter(torch.is_autocast_enabled, {x.device.type for x in tensors})]
    # no_grad takes twice as many calls
    return _without_autocast(rounding) if rounding else torch.set_grad_enabled(False)


@contextmanager
def _without_autocast(devices: Iterable[str]) -> Iterator[None]:
    with torch.no_grad(), ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
