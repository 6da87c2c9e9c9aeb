"""Products and diagonals of which calls have settled what a loss of torch does, too."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc._losses import LossKind, TorchLoss
from tests.curvature.test_norms_settled import batch
from tests.curvature.test_products_settled import TOLERANCE, jacobian, vector
from tests.modules.test_settled_layers import COUNT, Network, assert_same
from tests.settled.test_sweeps import num_sweeps

CALLS = 24  # what is done is written down by then
WEIGHTS = torch.tensor([0.5, 2.0], dtype=torch.float64)
LOSSES: dict[str, Any] = {
    "cross entropy": F.cross_entropy,
    "as a module": nn.CrossEntropyLoss(),
    "summed": nn.CrossEntropyLoss(reduction="sum"),
    "some ignored": partial(F.cross_entropy, ignore_index=0),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "weighed": partial(F.cross_entropy, weight=WEIGHTS),
    "squares": F.mse_loss,
    "logits": F.binary_cross_entropy_with_logits,
}


def kind_of(loss: Any) -> LossKind:
    known = TorchLoss.of(loss)
    assert known is not None
    return known.divided[0]


def drawn(loss: Any, size: int = 5) -> tuple[Tensor, Tensor]:
    """Points and targets, some of which one of the losses ignores."""
    x, y = batch(size)
    y[0] = 1
    if kind_of(loss).function is not F.cross_entropy:
        y = torch.rand(size, 2).double()
    return x, y


def matrix(model: Network, loss: Any, x: Tensor, y: Tensor) -> tuple[Tensor, list[tuple[str, int]]]:
    """``Jᵀ H J`` with J from plain gradients and H from second derivatives of the loss."""
    blocks, out = jacobian(model, x), model(x).detach()
    flat = torch.cat([block.flatten(2) for block in blocks.values()], 2).flatten(0, 1)
    hessian = torch.autograd.functional.hessian(lambda out: loss(out, y), out)
    square = hessian.reshape(out.numel(), out.numel())  # type: ignore[union-attr]
    return flat.T @ square @ flat, [(n, b[0, 0].numel()) for n, b in blocks.items()]


def assert_right(model: Network, loss: Any) -> None:
    """At two points in a row the product and the diagonal are right."""
    ggn = jacfunc.ggn(model, loss)
    for _ in range(2):
        (x, y), v = drawn(loss), vector(model)
        expected, sizes = matrix(model, loss, x, y)
        product = expected @ torch.cat([v[name].flatten() for name, _ in sizes])
        for flat, result in (product, ggn(x, y) @ v), (expected.diagonal(), ggn(x, y).diagonal()):
            parts = flat.split([size for _, size in sizes])
            pairs = zip(sizes, parts, strict=True)
            assert_same(result, {n: part.view_as(v[n]) for (n, _), part in pairs}, TOLERANCE)
        with torch.no_grad():
            model.first.weight.mul_(0.9)


def settled(loss: Any) -> Network:
    """A model, after so many products and diagonals that both are written down."""
    model = Network()
    ggn = jacfunc.ggn(model, loss)
    for _ in range(CALLS):
        x, y = drawn(loss)
        ggn(x, y) @ vector(model)
        ggn(x, y).diagonal()
    return model


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_written_down_holds_for_one_kind_of_loss(loss: str) -> None:
    model = settled(LOSSES[loss])
    for other in (loss, *LOSSES):
        assert_right(model, LOSSES[other])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_later_point_is_evaluated_once_and_swept_never(loss: str) -> None:
    model, known = settled(LOSSES[loss]), LOSSES[loss]
    (x, y), v = drawn(known), vector(model)
    for ask in (lambda G: G @ v), (lambda G: G.diagonal()):
        before = COUNT["evaluations"]
        assert num_sweeps(lambda: ask(jacfunc.ggn(model, known)(x, y))) == 0  # noqa: B023
        assert COUNT["evaluations"] == before + 1


def test_equal_settings_make_one_kind() -> None:
    assert kind_of(LOSSES["cross entropy"]) == kind_of(LOSSES["as a module"])
    assert len(set(map(kind_of, LOSSES.values()))) == len(LOSSES) - 1


def test_weights_are_taken_at_each_call_and_must_then_stay() -> None:
    weights = WEIGHTS.clone()
    loss = partial(F.cross_entropy, weight=weights)
    model = settled(loss)
    weights.mul_(torch.tensor([3.0, 0.5]))
    assert_right(model, loss)
    G = jacfunc.ggn(model, loss)(*drawn(loss))
    v = vector(model)
    assert G @ v
    weights.mul_(2.0)
    for ask in (lambda: G @ v), G.diagonal:
        with pytest.raises(ValueError, match="what the loss closes over must stay"):
            ask()


def test_targets_that_do_not_fit_are_refused_at_each_point() -> None:
    loss = LOSSES["smoothed"]
    model = settled(loss)
    x, y = drawn(loss)
    y[1] = 7
    for _ in range(2):
        G = jacfunc.ggn(model, loss)(x, y)
        for ask in (lambda: G @ vector(model)), G.diagonal:  # noqa: B023
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                ask()
    assert_right(model, loss)


def test_what_makes_too_much_at_once_is_written_down_in_two() -> None:
    size = 2450  # a gradient takes 24 MB, of which not three are kept
    model = nn.Linear(size, size, bias=False)
    for number in range(CALLS):
        x, v = torch.randn(2, size), {"weight": torch.randn(size, size)}
        G = jacfunc.ggn(model, F.mse_loss, copy=False)(x, torch.zeros(2, size))
        sweeps = num_sweeps(lambda: G @ v)  # noqa: B023
        assert (sweeps == 0) == (number >= 16)
    expected = (x @ v["weight"].T).T @ x / size
    torch.testing.assert_close((G @ v)["weight"], expected)


class Seeded(nn.Module):
    """Reads the seed of torch, and draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(torch.initial_seed())


@pytest.mark.parametrize("of", ["product", "diagonal"])
def test_a_point_has_the_generator_of_its_call(of: str) -> None:
    model, outside = Seeded(), 9
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for number in range(CALLS):
        x, seed = batch(5)[0], number % 3 + 1
        torch.manual_seed(seed)
        G = jacfunc.ggn(model, F.mse_loss)(x, torch.zeros(5, 2).double())
        torch.manual_seed(outside)
        result = G @ ones if of == "product" else G.diagonal()
        extended = torch.cat([x, torch.ones(5, 1)], 1).double()
        gram = extended.T @ extended / 5 * seed**2
        expected = gram.sum(1) if of == "product" else gram.diagonal()
        torch.testing.assert_close(result["layer.weight"][0], expected[:3])
        torch.testing.assert_close(result["layer.bias"], expected[3:].expand(2))
        assert torch.initial_seed() == outside
