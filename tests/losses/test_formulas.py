"""Second derivatives that are known, against Hessians that autograd gives in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian

import jacfunc
from jacfunc._losses import known_formula
from jacfunc._memory.counting import PeakBytes

CLASSES = torch.tensor([0, 3, 2, -100, 1])


def hooked() -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, out: 2 * out)
    return loss


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
POSITIONS = torch.tensor([[0, 3], [2, -100], [1, 1], [-100, -100], [2, 0]])
BITS = numbers(5, 3).sigmoid()

KNOWN = {
    "cross_entropy": (F.cross_entropy, numbers(5, 4).sin(), CLASSES),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), numbers(5, 4).sin(), CLASSES),
    "smoothed, summed, ignored": (
        nn.CrossEntropyLoss(label_smoothing=0.3, reduction="sum", ignore_index=3),
        numbers(5, 4).cos(),
        CLASSES.clamp(min=0),
    ),
    "settings in a partial": (
        partial(F.cross_entropy, reduction="sum", ignore_index=3, label_smoothing=0.1),
        numbers(5, 4).cos(),
        CLASSES.clamp(min=0),
    ),
    "class weights": (nn.CrossEntropyLoss(WEIGHTS), numbers(5, 4).cos(), CLASSES),
    "class weights, summed": (
        nn.CrossEntropyLoss(WEIGHTS, reduction="sum"),
        numbers(5, 4).cos(),
        CLASSES,
    ),
    "class weights, smoothed": (
        partial(F.cross_entropy, weight=WEIGHTS, label_smoothing=0.2, ignore_index=1),
        numbers(5, 4).cos(),
        CLASSES.clamp(min=0),
    ),
    "all ignored": (F.cross_entropy, numbers(5, 4).cos(), torch.full((5,), -100)),
    "all ignored, weighted, smoothed": (
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2),
        numbers(5, 4).cos(),
        torch.full((5,), -100),
    ),
    "positions": (F.cross_entropy, numbers(5, 4, 2).cos(), POSITIONS),
    "positions, weighted, smoothed": (
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2),
        numbers(5, 4, 2).cos(),
        POSITIONS,
    ),
    "classes in front of last": (
        F.cross_entropy,
        numbers(5, 2, 4).cos().transpose(1, 2),
        POSITIONS,
    ),
    "a plane": (F.cross_entropy, numbers(5, 4, 2, 1).cos(), POSITIONS.unsqueeze(2)),
    "probabilities": (F.cross_entropy, numbers(5, 4), numbers(5, 4).cos().softmax(1)),
    "probabilities that do not sum to one": (F.cross_entropy, numbers(5, 4), numbers(5, 4).abs()),
    "probabilities, weighted, smoothed": (
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2),
        numbers(5, 4, 2).cos(),
        numbers(5, 4, 2).cos().softmax(1),
    ),
    "probabilities, summed": (
        nn.CrossEntropyLoss(reduction="sum"),
        numbers(5, 4, 2).cos(),
        numbers(5, 4, 2).cos().softmax(1),
    ),
    "one class": (F.cross_entropy, numbers(5, 1), torch.zeros(5, dtype=torch.long)),
    "mse_loss": (F.mse_loss, numbers(5, 2, 3), numbers(5, 2, 3).cos()),
    "MSELoss, summed": (nn.MSELoss(reduction="sum"), numbers(5), numbers(5).cos()),
    "BCE": (F.binary_cross_entropy_with_logits, numbers(5, 3), BITS),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), numbers(5, 3), BITS),
    "BCE, weights": (nn.BCEWithLogitsLoss(WEIGHTS[:3]), numbers(5, 3), BITS),
    "BCE, weights of the positive": (
        nn.BCEWithLogitsLoss(WEIGHTS[:3], pos_weight=WEIGHTS[1:], reduction="sum"),
        numbers(5, 3),
        BITS,
    ),
    "Poisson": (F.poisson_nll_loss, numbers(5, 3), BITS.round()),
    "Poisson, in full": (nn.PoissonNLLLoss(full=True), numbers(5, 3), 3 * BITS),
}

UNKNOWN = {
    "a function of one's own": (lambda x, y: F.mse_loss(x, y), numbers(5, 2), numbers(5, 2)),
    "a hook": (hooked(), numbers(5, 4), CLASSES),
    "broadcast": (F.mse_loss, numbers(5, 2), numbers(5, 1)),
    "a tree": (F.mse_loss, (numbers(5, 2),), numbers(5, 2)),
    "a weight in a partial": (partial(F.mse_loss, weight=numbers(5, 2)), *[numbers(5, 2)] * 2),
    "an old setting": (partial(F.mse_loss, size_average=False), *[numbers(5, 2)] * 2),
    "settings without a formula": (
        partial(F.poisson_nll_loss, log_input=False),
        numbers(5, 2).exp(),
        numbers(5, 2).exp(),
    ),
    "no batch": (F.cross_entropy, numbers(5), numbers(5).softmax(0)),
    "positions of others": (F.cross_entropy, numbers(5, 4, 2), CLASSES),
    "another loss": (F.huber_loss, numbers(5, 2), numbers(5, 2)),
    "another module": (nn.HuberLoss(), numbers(5, 2), numbers(5, 2)),
}


def blocks_of(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """The second derivative, ``[B, M, B, M]``."""
    size = outputs.numel() // len(outputs)
    whole: Any = hessian(lambda x: loss(x, targets), outputs)
    return whole.reshape(len(outputs), size, len(outputs), size)


@pytest.mark.parametrize("name", KNOWN)
def test_a_root_is_one_of_the_hessian(name: str) -> None:
    loss, outputs, targets = KNOWN[name]
    formula = known_formula(loss, outputs, targets)
    assert formula is not None
    root = formula.roots()
    assert root is not None
    blocks = blocks_of(loss, outputs, targets)
    assert root.shape[:2] == blocks.shape[:2]
    for b, columns in enumerate(root):
        torch.testing.assert_close(columns @ columns.T, blocks[b, :, b], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", KNOWN)
def test_products_are_those_with_the_hessian(name: str) -> None:
    loss, outputs, targets = KNOWN[name]
    formula = known_formula(loss, outputs, targets)
    assert formula is not None
    matrix = blocks_of(loss, outputs, targets).flatten(2).flatten(0, 1)
    vectors = torch.randn(3, *outputs.shape, dtype=torch.float64)
    for vector in (vectors[0], vectors):
        expected = (vector.reshape(-1, len(matrix)) @ matrix).view(vector.shape)
        torch.testing.assert_close(formula.times(vector), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(4, 70_000), (1, 70_000, 5), (3, 50_000, 2), (300, 9, 500)])
@pytest.mark.parametrize("is_last", [False, True])
def test_products_of_many_classes_take_some_rows_at_a_time(
    shape: tuple[int, ...], is_last: bool
) -> None:
    outputs, vector = torch.randn(2, *shape)
    if is_last:  # in memory, as most modules have them
        outputs, vector = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (outputs, vector))
    rows = shape[:1] + shape[2:]
    targets = torch.randint(shape[1], rows).where(torch.rand(rows) < 0.9, -100)
    formula = known_formula(F.cross_entropy, outputs, targets)
    assert formula is not None
    with PeakBytes() as counter:
        product = formula.times(vector)
    piece = max(2**20, outputs.nbytes // max(rows))
    assert counter.peak <= outputs.nbytes + 5 * piece
    p = outputs.double().softmax(1)
    mean = (p * vector).sum(1, keepdim=True)
    factors = (targets >= 0).unsqueeze(1) / (targets >= 0).sum()
    error = product - factors * p * (vector - mean)
    assert (error.abs() <= 1e-5 * factors * p * (vector.abs() + 4)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_in_half_precision_err_by_its_rounding(dtype: torch.dtype) -> None:
    outputs, vector = torch.randn(2, 8, 1000).to(dtype)
    for loss, targets in (
        (F.cross_entropy, torch.arange(8)),
        (F.binary_cross_entropy_with_logits, torch.rand(8, 1000).to(dtype)),
    ):
        formula = known_formula(partial(loss, reduction="sum"), outputs, targets)
        precise = known_formula(
            partial(loss, reduction="sum"),
            outputs.double(),
            targets.double() if targets.is_floating_point() else targets,
        )
        assert formula is not None
        assert precise is not None
        product = formula.times(vector)
        assert product.dtype == dtype
        expected = precise.times(vector.double())
        assert ((product - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-7).all()


def test_products_are_exact_where_a_class_is_almost_certain() -> None:
    outputs = torch.tensor([[20.0, 0.0, 0.3]])
    vector = torch.tensor([[3.0, 1.0, -2.0]])
    formula = known_formula(F.cross_entropy, outputs, torch.tensor([0]))
    assert formula is not None
    p, u = outputs.double().softmax(1), vector.double()
    expected = p * (p.unsqueeze(1) * (u.unsqueeze(2) - u.unsqueeze(1))).sum(2)
    torch.testing.assert_close(formula.times(vector).double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(torch.tensor([1.0, -1.0])),
        nn.BCEWithLogitsLoss(torch.tensor([1.0, -1.0])),
    ],
)
def test_a_loss_that_is_not_convex_has_no_root(loss: nn.Module) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    is_bits = isinstance(loss, nn.BCEWithLogitsLoss)
    targets = torch.rand(4, 2) if is_bits else torch.tensor([0, 1, 0, 0])
    with pytest.raises(ValueError, match="ggn: the loss must be convex in the outputs"):
        jacfunc.ggn(model, loss)(x, targets).diagonal()


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_what_is_not_known_there_is_none(name: str) -> None:
    loss, outputs, targets = UNKNOWN[name]
    assert known_formula(loss, outputs, targets) is None


def test_certain_classes() -> None:
    """Where chances are below the smallest number, nothing is left, and no NaN."""
    outputs = torch.tensor([[900.0, 0.0, -900.0], [0.0, 40.0, 0.0]])
    formula = known_formula(F.cross_entropy, outputs, torch.tensor([0, 1]))
    assert formula is not None
    root = formula.roots()
    assert root is not None
    found = (root @ root.mT)[1].diagonal()
    least = torch.exp(torch.tensor(-40.0, dtype=torch.float64)) / 2
    torch.testing.assert_close(found, torch.stack([least, 2 * least, least]), rtol=1e-12, atol=0.0)
    assert torch.equal(root[0], torch.zeros_like(root[0]))


@pytest.mark.parametrize(
    ("loss", "targets", "error", "message"),
    [
        (F.cross_entropy, torch.tensor([0, 7]), IndexError, "Target 7 is out of bounds"),
        (nn.CrossEntropyLoss(reduction="none"), torch.tensor([0, 1]), ValueError, "one number"),
    ],
)
def test_targets_and_reductions_are_checked(
    loss: Callable[..., Tensor], targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        jacfunc.ggn(nn.Linear(2, 3), loss)(torch.ones(2, 2), targets).diagonal()
