"""Gradient norms of calls of which earlier ones have settled all but the numbers."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from tests.modules.test_settled_layers import BEFORE, CHANGES, COUNT, HIDDEN, Network, points
from tests.modules.test_settled_layers import fresh as fresh  # a fixture of all tests here


def batch(size: int) -> tuple[Tensor, Tensor]:
    return points(size), torch.randint(2, (size,))


def expected(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A plain gradient of each sample's part of the mean."""
    norms = []
    for point, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(point[None]), label[None]) / len(x)
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm())
    return torch.stack(norms)


def settled(size: int = 5, loss: Any = F.cross_entropy) -> tuple[Network, Callable[..., Tensor]]:
    """A model and its norms, after calls of this size of which nothing is left to learn."""
    model = Network()
    norms = jacfunc.gradient_norms(model, loss)
    for _ in range(BEFORE["calls"] - 1):
        norms(*batch(size))
    return model, norms


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=type)
def test_each_call_evaluates_once_and_is_right(size: int, loss: Any) -> None:
    model, norms = settled(size, loss)
    for _ in range(3):
        x, y = batch(size)
        before = COUNT["evaluations"]
        result = norms(x, y)
        assert COUNT["evaluations"] == before + 1
        torch.testing.assert_close(result, expected(model, x, y))
        with torch.no_grad():
            model.first.weight.mul_(0.9)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change: str) -> None:
    model, norms = settled()
    CHANGES[change](model)
    for _ in range(2):
        x, y = batch(5)
        torch.testing.assert_close(norms(x, y), expected(model, x, y))


@pytest.mark.parametrize("how", ["twice", "without a rule", "as a view", "looks", "goes apart"])
def test_another_course_is_taken_anew(how: str) -> None:
    model, norms = settled()
    for turn in (how, "", how, how, how, ""):
        HIDDEN["how"] = turn
        x, y = batch(5)
        torch.testing.assert_close(norms(x, y), expected(model, x, y))


@pytest.mark.parametrize("how", ["draws", "raises"])
def test_refusals_are_those_of_other_calls(how: str) -> None:
    model, norms = settled()
    HIDDEN["how"] = how
    with pytest.raises((NotImplementedError, ArithmeticError), match=r"random numbers|too large"):
        norms(*batch(5))
    HIDDEN["how"] = ""
    x, y = batch(5)
    torch.testing.assert_close(norms(x, y), expected(model, x, y))


@pytest.mark.parametrize("how", ["writes", "adds"])
def test_writes_go_into_copies(how: str) -> None:
    model, norms = settled()
    x, y = batch(5)
    before, right = model.first.weight.detach().clone(), expected(model, x, y)
    HIDDEN["how"] = how
    norms(x, y)
    assert torch.equal(model.first.weight, before)
    HIDDEN["how"] = ""
    torch.testing.assert_close(norms(x, y), right)


def test_targets_that_do_not_fit_are_refused_as_torch_does() -> None:
    model, norms = settled()
    x, y = batch(5)
    for _ in range(4):
        with pytest.raises(IndexError, match="out of bounds"):
            norms(x, y + 7)
    torch.testing.assert_close(norms(x, y), expected(model, x, y))


def test_a_loss_of_ones_own_finds_the_module_as_it_is() -> None:
    model, seen = Network(), list[bool]()
    first = model.first.weight

    def loss(out: Tensor, y: Tensor) -> Tensor:
        seen.append(model.first.weight is first)
        return F.cross_entropy(out, y)

    norms = jacfunc.gradient_norms(model, loss)
    for _ in range(6):
        x, y = batch(5)
        torch.testing.assert_close(norms(x, y), expected(model, x, y))
    assert seen
    assert all(seen)


def test_threads_do_not_meet() -> None:
    model, norms = settled()
    data = [batch(5) for _ in range(8)]
    right = [expected(model, *some) for some in data]
    results: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        results[number] = [norms(*data[number]) for _ in range(10)]

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, every in results.items():
        for result in every:
            torch.testing.assert_close(result, right[number])
    assert len(results) == 8


def test_autocast_rounds_no_norms() -> None:
    model, norms = settled()
    model.float()
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        first, *others = [norms(x, y) for _ in range(6)]
    assert first.dtype == torch.float32
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_inside_a_transform_it_is_refused() -> None:
    _, norms = settled()
    x, y = batch(5)
    with pytest.raises(NotImplementedError, match="inside a transform"):
        torch.func.vmap(lambda shift: norms(x + shift, y))(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_targets_may_be_made_in_inference_mode(mode: Any) -> None:
    model, norms = settled()
    x, y = batch(5)
    with torch.inference_mode():
        own = x.clone(), y.clone()
    with mode():
        got = norms(*own), jacfunc.gradient_norms(Network(), F.cross_entropy)(*own)
    torch.testing.assert_close(got[0].clone(), expected(model, x, y))
    assert got[1].shape == (5,)
