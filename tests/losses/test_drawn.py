"""Columns of a Fisher matrix of which the drawn targets alone are kept, against dense ones."""

from __future__ import annotations

import pytest
import torch

from jacfunc._losses.drawn import ClassColumns, DenseColumns, Drawn
from jacfunc._memory.counting import PeakBytes

SHAPES = [(5, 4), (3, 2, 4), (2, 3, 2, 4), (3, 300, 2000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draws", [1, 3])
def test_products_are_those_of_the_gradients(shape: tuple[int, ...], draws: int) -> None:
    logits, vector = torch.randn(2, *shape, dtype=torch.float64)
    classes = torch.randint(shape[-1], (*shape[:-1], draws))
    hits = torch.nn.functional.one_hot(classes.movedim(-1, 0), shape[-1])
    gradients = 0.3 * (logits.softmax(-1) - hits)
    along = (gradients * vector).flatten(2).sum(2)
    expected = torch.einsum("rb,rb...->b...", along, gradients)
    columns = ClassColumns(logits, classes, 0.3)
    torch.testing.assert_close(columns.dense(), gradients)
    for part in (columns, DenseColumns(gradients)):
        torch.testing.assert_close(part.dot(vector), along)
        torch.testing.assert_close(Drawn((part,)).times((vector,))[0], expected)
        torch.testing.assert_close(
            Drawn((part,)).times_batch((torch.stack((vector, -vector)),))[0],
            torch.stack((expected, -expected)),
        )
    if len(shape) > 2:
        moved = ClassColumns(logits, classes, 0.3, 1)
        torch.testing.assert_close(moved.dense(), gradients.movedim(-1, 2))
        (found,) = Drawn((moved,)).times((vector.movedim(-1, 1),))
        torch.testing.assert_close(found, expected.movedim(-1, 1))


def test_gradients_of_scalars() -> None:
    gradients, vector = torch.randn(3, 5), torch.randn(5)
    (found,) = Drawn((DenseColumns(gradients),)).times((vector,))
    torch.testing.assert_close(found, gradients.square().sum(0) * vector)


def test_half_precision() -> None:
    logits, vector = torch.randn(2, 6, 50).bfloat16()
    classes = torch.randint(50, (6, 2))
    drawn = Drawn((ClassColumns(logits, classes, 1.0),))
    exact = Drawn((ClassColumns(logits.double(), classes, 1.0),))
    (found,), (expected,) = drawn.times((vector,)), exact.times((vector.double(),))
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


def test_draws_take_no_memory() -> None:
    logits, vector = torch.randn(2, 64, 20_000)
    classes = torch.randint(20_000, (64, 30))
    with PeakBytes() as counter:
        Drawn((ClassColumns(logits, classes, 1.0),)).times((vector,))
    assert counter.peak <= 1.5 * logits.nbytes
