"""What the loss on held-out patients would be without one patient, told without fitting again.

Logistic regression on the breast cancer data of scikit-learn. Without patient i the weights move by
about ``m_i = H⁻¹ g_i``, with H the Hessian of the training loss at its minimum and g_i the gradient
of the patient's own loss. So the loss L of held-out patients changes, the nearer the longer, by

    ∇Lᵀ m_i      ∇Lᵀ m_i / (1 - h_i)      L(θ + m_i / (1 - h_i)) - L(θ)

where the leverage ``h_i = l_i'' x_iᵀ H⁻¹ x_i`` is what the patient has in H. H is an operator that
is solved with, for all patients at once. Then every patient is left out in truth, and the model
fitted again.

Source: Cook, Weisberg, "Residuals and influence in regression" (1982); Pregibon, "Logistic
regression diagnostics" (Annals of Statistics 9, 1981), for the leverage; Koh, Liang, "Understanding
black-box predictions via influence functions" (ICML 2017).

Run: ``python docs/gallery/leave_one_out.py``

Comes out: correlations of 0.992, 0.996 and 0.9998 with 400 refits; the loss of a patient who is
left out is told to three digits.
"""

from __future__ import annotations

from functools import partial

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn import functional as F

import jacfunc

TRAINING_PATIENTS = 400
PENALTY = 10.0
NEWTON_STEPS = 12
LABELS = {"training": "in training", "told": "left out, as told", "refits": "left out, by refits"}


def patients() -> tuple[Tensor, Tensor]:
    """Measurements ``[n, 31]``, standardized, with a one at the end, shuffled; and diagnoses."""
    x, y = (torch.tensor(data, dtype=torch.float64) for data in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    train = x[:TRAINING_PATIENTS]
    x = (x - train.mean(0)) / train.std(0)
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y


def losses(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The loss of every patient, ``[B]``; by K fits ``[K, 31]``, ``[K, B]``."""
    logits = weights @ x.T
    return F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")


def objective(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What training makes least."""
    return losses(weights, x, y).sum() + PENALTY / 2 * weights[:-1].square().sum()


def newton_fits(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Weights ``[K, 31]`` of K fits, each with a count for every patient, by Newton's method."""
    penalty = torch.full((x.shape[1],), PENALTY, dtype=x.dtype)
    penalty[-1] = 0
    weights = torch.zeros(len(counts), x.shape[1], dtype=x.dtype)
    for _ in range(NEWTON_STEPS):
        chances = (weights @ x.T).sigmoid()
        gradients = (counts * (chances - y)) @ x + penalty * weights
        curvatures = counts * chances * (1 - chances)
        hessians = (curvatures @ (x[:, :, None] * x[:, None]).flatten(1)).unflatten(1, (31, 31))
        weights = weights - torch.linalg.solve(hessians + penalty.diag(), gradients)
    return weights


def correlation(told: Tensor, true: Tensor) -> float:
    """Pearson's, of what is told with what is true."""
    return float(torch.corrcoef(torch.stack([told, true]))[0, 1])


def main() -> dict[str, float]:
    """Print and return correlations with the refits, and the loss of patients left out."""
    torch.manual_seed(0)
    x, y = patients()
    (x, held_x), (y, held_y) = (data.tensor_split([TRAINING_PATIENTS]) for data in (x, y))
    (weights,) = newton_fits(x, y, torch.ones(1, len(x), dtype=x.dtype))
    refits = newton_fits(x, y, 1 - torch.eye(len(x), dtype=x.dtype))

    _, H = jacfunc.hessian_operator(partial(objective, x=x, y=y), weights)
    own, J = jacfunc.linearize(partial(losses, x=x, y=y), weights)
    gradients = J.matrix()
    moves = H.solve(gradients.T, side="both").T  # of the weights, [patients, 31]
    chances = (x @ weights).sigmoid()  # l' is p - y, and l'' is p (1 - p)
    leverages = chances * (1 - chances) / (chances - y) ** 2 * (gradients * moves).sum(1)
    new_weights = weights + moves / (1 - leverages).unsqueeze(1)

    def held_loss_of(weights: Tensor) -> Tensor:
        return losses(weights, held_x, held_y).sum(-1)

    before, gradient = jacfunc.value_and_jacobian(held_loss_of)(weights)
    changes = held_loss_of(refits) - before
    results = {
        "first order": correlation(moves @ gradient, changes),
        "with leverage": correlation((new_weights - weights) @ gradient, changes),
        "at new weights": correlation(held_loss_of(new_weights) - before, changes),
    }
    results["training"] = float(own.mean())
    for name, each in (("told", new_weights), ("refits", refits)):
        results[name] = float(losses(each, x, y).diagonal().mean())
    print("change of the held-out loss  correlation with refits")
    for name in ("first order", "with leverage", "at new weights"):
        print(f"{name:27}  {results[name]:23.4f}")
    print("loss of a patient            in the mean")
    for name in ("training", "told", "refits"):
        print(f"{LABELS[name]:27}  {results[name]:11.4f}")
    return results


if __name__ == "__main__":
    main()
