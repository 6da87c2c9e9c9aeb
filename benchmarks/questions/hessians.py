"""Hessians of functions of one tensor with one number out: which product of modes, and by whom."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Question
from benchmarks.contestants.functions import HESSIAN, HESSIAN_BASELINE, HESSIANS, case
from benchmarks.problems import formulas
from benchmarks.problems.functions import DOUBLE, SINGLE, Function, portable
from benchmarks.problems.judge import Func, looped_twice

LABEL = 3


def rosenbrock(size: int, draw: Any, xp: Any = torch) -> tuple[Func, Tensor]:
    """The valley that minimizers are tried on: its Hessian has three diagonals."""

    def func(x: Any) -> Any:
        return (100 * xp.square(x[1:] - xp.square(x[:-1])) + xp.square(1 - x[:-1])).sum()

    return func, draw(size)


def logistic(draw: Any) -> tuple[Func, Tensor]:
    """The loss of logistic regression on scikit-learn's digits 0 and 1, by its weights."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(n_class=2, return_X_y=True)
    weights = draw(images.shape[1])
    scaled, targets = (torch.as_tensor(numbers).to(weights) for numbers in (images / 16, labels))
    return lambda w: F.binary_cross_entropy_with_logits(scaled @ w, targets), weights


def mlp_loss(inputs: int, draw: Any) -> tuple[Func, Tensor]:
    """The cross-entropy of a perceptron with ten classes, by its inputs."""
    scores, x = formulas.mlp(inputs, 10, 64, draw)
    return lambda x: -torch.log_softmax(scores(x), -1)[LABEL], x


def attention_sum(length: int, width: int, draw: Any) -> tuple[Func, Tensor]:
    mixed, x = formulas.attention(length, width, draw)
    return lambda x: mixed(x).sum(), x


PROBLEMS: tuple[tuple[str, int, Function], ...] = (
    ("energy, 64", 64, portable(partial(formulas.energy, 64))),
    ("energy, 1024", 1024, portable(partial(formulas.energy, 1024))),
    ("rosenbrock, 16", 16, portable(partial(rosenbrock, 16))),
    ("rosenbrock, 256", 256, portable(partial(rosenbrock, 256))),
    ("logistic regression, 64", 64, Function(logistic)),
    ("loss of an mlp by its inputs, 64", 64, Function(partial(mlp_loss, 64))),
    ("attention summed, 16 × 8", 128, Function(partial(attention_sum, 16, 8))),
)
DOUBLED = ("energy, 64", "rosenbrock, 256")

QUESTION = Question(
    "hessians",
    "How should a Hessian be taken?",
    HESSIAN,
    tuple(
        case(
            *(name, function, {"inputs": inputs, "outputs": 1}, dtype),
            *(HESSIANS, HESSIAN_BASELINE, looped_twice),
            is_quick=(name, dtype) == (PROBLEMS[0][0], SINGLE),
        )
        for name, inputs, function in PROBLEMS
        for dtype in ((SINGLE, DOUBLE) if name in DOUBLED else (SINGLE,))
    ),
)
