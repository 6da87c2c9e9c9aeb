"""Gradient norms of which the loss is written down with the sweep: every setting, and changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import jacfunc
from jacfunc._log import trail
from tests.settled.test_sweeps import CALLS, num_sweeps

WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)


def classes() -> Tensor:
    return torch.randint(3, (5,))


def some_ignored() -> Tensor:
    return torch.cat([torch.randint(1, 3, (3,)), torch.tensor([0, 0])])[torch.randperm(5)]


def chances() -> Tensor:
    return torch.rand(5, 3, dtype=torch.float64).softmax(1)


def numbers() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


LOSSES: dict[str, tuple[Any, Callable[[], Tensor]]] = {
    "a mean": (F.cross_entropy, classes),
    "a sum": (partial(F.cross_entropy, reduction="sum"), classes),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.2), classes),
    "weighted": (partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.1), classes),
    "a module": (nn.CrossEntropyLoss(weight=WEIGHT), classes),
    "some ignored": (nn.CrossEntropyLoss(ignore_index=0), some_ignored),
    "chances": (F.cross_entropy, chances),
    "squares": (F.mse_loss, numbers),
    "a sum of squares": (nn.MSELoss(reduction="sum"), numbers),
    "logits": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT.sqrt()), chances),
    "rates": (nn.PoissonNLLLoss(), chances),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def points() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def expected(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """What each sample alone adds to the gradient, by a plain pullback of its row."""
    out = model(x).detach().requires_grad_()
    (rows,) = torch.autograd.grad(loss(out, y), out)
    norms = []
    for point, row in zip(x, rows, strict=True):
        grads = torch.autograd.grad(model(point[None]), [*model.parameters()], row[None])
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm())
    return torch.stack(norms)


def written(loss: Any, targets: Callable[[], Tensor]) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A model and its norms, after so many calls that all is written down, if it can be."""
    model = network()
    norms = jacfunc.gradient_norms(model, loss)
    for _ in range(CALLS):
        norms(points(), targets())
    return model, norms


def check(model: nn.Module, norms: Callable[..., Tensor], loss: Any, y: Tensor) -> None:
    x = points()
    torch.testing.assert_close(norms(x, y), expected(model, loss, x, y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_no_graph_of_the_loss_is_swept(kind: str) -> None:
    loss, targets = LOSSES[kind]
    model, norms = written(loss, targets)
    x, y = points(), targets()
    assert num_sweeps(lambda: norms(x, y)) == 0
    for _ in range(3):
        check(model, norms, loss, targets())
        with torch.no_grad():
            model[0].weight.mul_(0.9)  # type: ignore[index]


def test_a_loss_without_a_formula_is_differentiated() -> None:
    loss = nn.PoissonNLLLoss(log_input=False, eps=10.0)
    model, norms = written(loss, chances)
    check(model, norms, loss, chances())


@pytest.fixture
def doubled() -> Iterator[None]:
    """Each module that is a loss gives twice of what it is."""
    twice = lambda module, _, out: 2 * out if isinstance(module, nn.CrossEntropyLoss) else None  # noqa: E731
    handle = register_module_forward_hook(twice)
    yield
    handle.remove()


def changed(loss: nn.CrossEntropyLoss, how: str) -> None:
    match how:
        case "a setting":
            loss.label_smoothing = 0.3
        case "the reduction":
            loss.reduction = "sum"
        case "numbers of the weight":
            assert loss.weight is not None
            loss.weight.mul_(torch.tensor([1.0, 3.0, 0.2]))
        case "another weight":
            loss.weight = torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64)
        case "no weight":
            loss.weight = None
        case "a hook":
            loss.register_forward_hook(lambda module, args, out: 2 * out)
        case "a forward of its own":
            loss.forward = lambda out, y: F.cross_entropy(3 * out, y)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "how",
    [
        *("a setting", "the reduction", "numbers of the weight", "another weight", "no weight"),
        *("a hook", "a forward of its own"),
    ],
)
def test_changes_of_the_loss_count(how: str) -> None:
    loss = nn.CrossEntropyLoss(weight=WEIGHT.clone())
    model, norms = written(loss, classes)
    changed(loss, how)
    for _ in range(2):
        check(model, norms, loss, classes())


def test_changed_keywords_count() -> None:
    loss = partial(F.cross_entropy, label_smoothing=0.1)
    model, norms = written(loss, classes)
    loss.keywords["label_smoothing"] = 0.4
    check(model, norms, loss, classes())


def test_hooks_that_see_all_modules_count(request: pytest.FixtureRequest) -> None:
    loss = nn.CrossEntropyLoss()
    model, norms = written(loss, classes)
    request.getfixturevalue("doubled")
    for _ in range(12):  # until calls of this kind are settled again
        check(model, norms, loss, classes())


def test_other_targets_are_taken_as_what_they_are() -> None:
    model, norms = written(F.cross_entropy, classes)
    for targets in (chances, classes, lambda: classes().int().long(), chances):
        check(model, norms, F.cross_entropy, targets())


def test_one_model_has_the_norms_of_many_losses() -> None:
    model, losses = network(), [loss for loss, targets in LOSSES.values() if targets is classes]
    every = [jacfunc.gradient_norms(model, loss) for loss in losses]
    for _ in range(CALLS):
        for norms, loss in zip(every, losses, strict=True):
            check(model, norms, loss, classes())


@pytest.mark.parametrize(
    "loss", [partial(F.mse_loss, weight=torch.rand(5, 3).double()), nn.PoissonNLLLoss(False)]
)
def test_a_loss_without_a_formula_leaves_other_doors_as_they_are(loss: Any) -> None:
    model = network()
    norms = jacfunc.gradient_norms(model, loss)
    for _ in range(CALLS):
        x, y = points(), chances()
        jacfunc.ntk(model, None, x)
        torch.testing.assert_close(norms(x, y), expected(model, loss, x, y))
    with trail() as steps:
        norms(x, y)
        assert num_sweeps(lambda: jacfunc.ntk(model, None, x)) == 0
    assert not any("taken anew" in step for step in steps)
