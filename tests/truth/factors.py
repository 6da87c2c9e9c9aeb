"""A module's Jacobian as jacfunc's factors, for tests of what is done with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from jacfunc._factored import FactoredJacobian
from jacfunc._modules import BatchOptions, Independence, ModuleAtBatch


def at_batch(module: nn.Module, *inputs: Tensor) -> ModuleAtBatch:
    """The module at a batch, whose samples are taken to be independent."""
    options = BatchOptions("test", module, None, 0, "error", None, Independence(True))
    return options.at((inputs, {}))


@contextmanager
def factors_of(module: nn.Module, *inputs: Tensor) -> Iterator[FactoredJacobian]:
    """Factors of the Jacobians of all samples; the module is lent, so that they can be swept."""
    module_at_batch = at_batch(module, *inputs)
    with module_at_batch.undisturbed():
        ((_, factors),) = module_at_batch.factors()
        yield factors
