"""A module's Jacobian as jacfunc's factors, for tests of what is done with them."""

from __future__ import annotations

from torch import Tensor, nn

from jacfunc._factored import FactoredJacobian
from jacfunc._modules import BatchOptions, Independence, ModuleAtBatch


def at_batch(module: nn.Module, *inputs: Tensor) -> ModuleAtBatch:
    """The module at a batch, whose samples are taken to be independent."""
    options = BatchOptions("test", module, None, 0, "error", None, Independence(True))
    return options.at((inputs, {}))


def factors_of(module: nn.Module, *inputs: Tensor) -> FactoredJacobian:
    """Factors of the Jacobians of all samples."""
    ((_, factors),) = at_batch(module, *inputs).factors()
    return factors
