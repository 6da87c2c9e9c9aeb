"""A back end for laplace-torch, of one method: its Jacobians are taken by jacfunc.

laplace-torch asks its back end for the Jacobians of a batch. By default the batch is differentiated
as one function of the parameters: a row for every output of every sample is pulled back through the
whole batch. Per sample there are no more rows than outputs. The numbers are the same, and all that
is made of them; so are the variances of outputs, J Σ Jᵀ, which an operator gives without J.

Source: Daxberger et al., "Laplace redux: effortless Bayesian deep learning" (NeurIPS 2021).

Run: ``pip install laplace-torch``, then ``python docs/gallery/laplace_backend.py``

Comes out: the same Jacobians, predictions and variances.
"""

from __future__ import annotations

from typing import Any

import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc

TRAINING_IMAGES, TEST_IMAGES = 500, 64


class JacfuncGGN(CurvlinopsGGN):  # type: ignore[misc]
    """The default back end, with Jacobians by jacfunc: pass it as ``backend=JacfuncGGN``."""

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians ``[B, C, P]`` and outputs ``[B, C]``."""
        jacobian = jacfunc.module_jacobian(
            self.model, per_sample=True, flat=True, full_output=True, create_graph=enable_backprop
        )
        J, outputs, _ = jacobian(x)
        if self.subnetwork_indices is not None:
            J = J[:, :, self.subnetwork_indices]
        return J, outputs if enable_backprop else outputs.detach()


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` in 0 to 1, shuffled, and labels."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))[: TRAINING_IMAGES + TEST_IMAGES]
    images = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    return images, torch.tensor(labels)[order]


def train(x: Tensor, y: Tensor) -> nn.Module:
    """A network of 810 parameters."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def main() -> dict[str, float]:
    """Print and return log losses by both back ends, and how far they are apart, relative."""
    torch.manual_seed(0)
    sizes = (TRAINING_IMAGES, TEST_IMAGES)
    (x, test_x), (y, test_y) = (data.split(sizes) for data in digits())
    model = train(x, y)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=100)

    jacobians, gradients, chances = {}, {}, {}
    for backend in (CurvlinopsGGN, JacfuncGGN):
        posterior = Laplace(model, "classification", "all", "full", backend=backend)
        posterior.fit(loader)
        jacobians[backend], _ = posterior.backend.jacobians(test_x)
        images = test_x.clone().requires_grad_()
        J, outputs = posterior.backend.jacobians(images, enable_backprop=True)
        (gradients[backend],) = torch.autograd.grad(J.square().sum() + outputs.sum(), images)
        chances[backend] = posterior(test_x, link_approx="probit")
    variances = posterior.functional_variance(jacobians[JacfuncGGN])
    operator = jacfunc.module_operator(model, per_sample=True)(test_x)
    by_operator = operator.quad(posterior.posterior_covariance, per_sample=True)

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max() / other.abs().max())

    results = {
        "own": float(F.nll_loss(chances[CurvlinopsGGN].log(), test_y)),
        "jacfunc": float(F.nll_loss(chances[JacfuncGGN].log(), test_y)),
        "Jacobians": apart(jacobians[JacfuncGGN], jacobians[CurvlinopsGGN]),
        "gradients": apart(gradients[JacfuncGGN], gradients[CurvlinopsGGN]),
        "chances": apart(chances[JacfuncGGN], chances[CurvlinopsGGN]),
        "variances": apart(by_operator, variances),
    }
    print("back end       log loss")
    for name, label in (("own", "laplace-torch"), ("jacfunc", "jacfunc")):
        print(f"{label:13}  {results[name]:8.4f}")
    return results


if __name__ == "__main__":
    main()
