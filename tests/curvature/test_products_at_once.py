"""First products at points of modules of torch's own layers, which need not be called any more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from tests.curvature.test_products_settled import TOLERANCE, expected, vector
from tests.modules.test_settled_layers import assert_same
from tests.settled.test_works import (
    CHANGES,
    DRAW,
    change,
    images,
    in_place,
    layers,
    num_modules,
    with_a_past,
)

CALLS = 24  # after sixteen a product is written down


BETWEEN = [name for name in CHANGES if name != "a method of tensors"]
"""Changes of a module; jacfunc itself would take another method of tensors for that of torch."""


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    return DRAW(size), torch.randint(3, (size,))


def settled(module: nn.Module, **options: Any) -> Callable[..., Any]:
    """The matrix of a module, after many products."""
    ggn = jacfunc.ggn(module, F.cross_entropy, **options)
    for _ in range(CALLS):
        _ = ggn(*batch()) @ vector(module)
    return ggn


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "originals"])
def test_the_first_product_calls_no_module(copies: bool) -> None:
    module = layers().double()
    ggn = settled(module, copy=copies)
    for _ in range(3):
        (x, y), v = batch(), vector(module)
        assert num_modules(lambda: ggn(x, y) @ v) == 0  # noqa: B023
        assert_same(ggn(x, y) @ v, expected(module, x, v), TOLERANCE)
        change(module)


@pytest.mark.parametrize("make", [in_place, images, with_a_past])
def test_products_of_other_layers_are_right(make: Callable[[], nn.Module]) -> None:
    module = make().double().eval()
    ggn = settled(module)
    for _ in range(3):
        (x, y), v = batch(), vector(module)
        before = [buffer.clone() for buffer in module.buffers()]
        made = ggn(x, y) @ v
        assert all(map(torch.equal, module.buffers(), before))
        assert_same(made, expected(copy.deepcopy(module), x, v), TOLERANCE)
        change(module)


def test_later_products_and_other_answers_are_of_the_same_point() -> None:
    module = layers().double()
    ggn, (x, y), v = settled(module), batch(), vector(module)
    first = expected(module, x, v)
    point = ggn(x, y)
    matrix = jacfunc.ggn(copy.deepcopy(module), F.cross_entropy)(x, y).matrix()
    change(module)
    for _ in range(3):
        assert_same(point @ v, first, TOLERANCE)
    torch.testing.assert_close(point @ torch.eye(len(matrix)).double(), matrix)
    torch.testing.assert_close(point.matrix(), matrix)


@pytest.mark.parametrize("name", BETWEEN)
def test_what_changes_before_the_product(name: str) -> None:
    """Copies are those of the point; what torch calls is what it is now."""
    module = layers().double()
    ggn, (x, y), v = settled(module), batch(), vector(module)
    for _ in range(2):
        then, point = expected(module, x, v), ggn(x, y)
        of_torch = name in ("a method of a class of layers", "a function of layers")
        of_torch |= name in ("a function below", "a method of all modules", "a hook of all modules")
        with CHANGES[name](module):
            now = expected(module, x, v)
            made = point @ v
        assert_same(made, now if of_torch else then, TOLERANCE)


@pytest.mark.parametrize("name", BETWEEN)
def test_what_changes_before_the_point(name: str) -> None:
    module = layers().double()
    ggn, (x, y), v = settled(module), batch(), vector(module)
    for _ in range(2):
        with CHANGES[name](module):
            assert_same(ggn(x, y) @ v, expected(module, x, v), TOLERANCE)
        assert_same(ggn(x, y) @ v, expected(module, x, v), TOLERANCE)


def test_hooks_on_parameters_and_casts_are_seen() -> None:
    module: Any = layers().double()
    ggn, (x, y), v = settled(module), batch(), vector(module)
    handle = module[1].weight.register_hook(lambda u: 2 * u)
    assert num_modules(lambda: ggn(x, y) @ v) > 0
    handle.remove()
    assert num_modules(lambda: ggn(x, y) @ v) == 0
    point = ggn(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(point @ v, expected_without_casts(module, x, v), TOLERANCE)


def expected_without_casts(module: Any, x: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.autocast("cpu", enabled=False):
        return expected(module, x, v)


def test_targets_are_looked_at_as_ever() -> None:
    module = layers().double()
    ggn, (x, y), v = settled(module), batch(), vector(module)
    point = ggn(x, y + 3)
    for _ in range(2):
        with pytest.raises((IndexError, RuntimeError)):
            _ = point @ v
    ignored = torch.full_like(y, -100)
    assert all(not x.any() for x in (ggn(x, ignored) @ v).values())


def test_originals_must_stay_as_they_were() -> None:
    module = layers().double()
    ggn, (x, y), v = settled(module, copy=False), batch(), vector(module)
    point = ggn(x, y)
    change(module)
    with pytest.raises(ValueError, match="must stay as"):
        _ = point @ v


def test_lists_of_layers_are_those_of_the_point() -> None:
    conv: Any = nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect")
    module = nn.Sequential(conv, nn.Flatten(), nn.Linear(48, 3)).double()
    ggn, (x, y), v = settled(module), batch(), vector(module)
    before, padding = conv._reversed_padding_repeated_twice, [1, 1, 1, 1]
    assert before == padding
    before[:] = [2, 0, 2, 0]
    other, point = expected(module, x, v), ggn(x, y)
    before[:] = padding
    assert_same(point @ v, other, TOLERANCE)
    assert_same(ggn(x, y) @ v, expected(module, x, v), TOLERANCE)


def test_what_draws_is_evaluated() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(32, 3), nn.Dropout(0.5)).double()
    ggn = jacfunc.ggn(module, F.cross_entropy, randomness="same")
    (x, y), v = batch(), vector(module)
    made = []
    for _ in range(CALLS):
        torch.manual_seed(1)
        made.append(ggn(x, y) @ v)
    torch.manual_seed(2)
    other = ggn(x, y) @ v
    assert_same(made[-1], made[0], TOLERANCE)
    assert not torch.allclose(other["1.weight"], made[0]["1.weight"])
