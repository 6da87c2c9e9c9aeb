"""A module's Jacobian as jacfunc's factors, for tests of what is done with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from jacfunc._factored import FactoredJacobian
from jacfunc._modules import Batching, BatchOptions, ModuleAtBatch


def at_batch(module: nn.Module, *inputs: Tensor) -> ModuleAtBatch:
    """The module at a batch, whose samples are taken to be independent."""
    options = BatchOptions.read("test", module, None, Batching(), None, None, True)
    return options.at((inputs, {}))


@contextmanager
def factors_of(module: nn.Module, *inputs: Tensor) -> Iterator[FactoredJacobian]:
    """The Jacobians of all samples as factors, while the module is lent for pullbacks."""
    point = at_batch(module, *inputs)
    jacobian = point.between(0, point.size)
    with point.undisturbed():
        yield jacobian
