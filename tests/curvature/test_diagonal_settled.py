"""Gauss-Newton diagonals at calls of which earlier ones have settled all but the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from tests.curvature.test_norms_settled import batch
from tests.modules.test_settled_layers import (
    BEFORE,
    CHANGES,
    COUNT,
    HIDDEN,
    KINDS,
    Network,
    assert_same,
    loop,
)
from tests.modules.test_settled_layers import fresh as fresh  # a fixture of all tests here
from tests.settled.test_sweeps import num_sweeps


def hessians(model: nn.Module, x: Tensor) -> Tensor:
    """Those of the mean cross entropy in the outputs of each sample, by their formula."""
    p = torch.cat([model(point[None]) for point in x]).detach().softmax(1)
    return (p.diag_embed() - p[:, :, None] * p[:, None, :]) / len(x)


def expected(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """From plain gradients of each output of each sample."""
    curvature = hessians(model, x)
    return {
        name: torch.einsum("bij,bi...,bj...->...", curvature, block, block)
        for name, block in loop(model, x).items()
    }


def settled(size: int = 5) -> Network:
    """A model after diagonals of this size of which nothing is left to learn."""
    model = Network()
    ggn = jacfunc.ggn(model, F.cross_entropy)
    for _ in range(BEFORE["calls"] - 1):
        ggn(*batch(size)).diagonal()
    return model


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=type)
def test_each_call_evaluates_once_and_is_right(size: int, loss: Any) -> None:
    model = settled(size)
    ggn = jacfunc.ggn(model, loss)
    for _ in range(3):
        x, y = batch(size)
        before = COUNT["evaluations"]
        result = ggn(x, y).diagonal()
        assert COUNT["evaluations"] == before + 1
        assert_same(result, expected(model, x))
        with torch.no_grad():
            model.first.weight.mul_(0.9)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", ["linear layers", "images", "tied", "recurrent"])
def test_modules_of_all_kinds(kind: str, size: int) -> None:
    make, draw = KINDS[kind]
    module = make().double()
    ggn = jacfunc.ggn(module, F.cross_entropy)
    for number in range(BEFORE["calls"] + 2):
        x, y = draw(size), torch.randint(2, (size,))
        result = ggn(x, y).diagonal()
        if number in (0, 1, BEFORE["calls"], BEFORE["calls"] + 1):
            assert_same(result, expected(module, x))


def test_no_graph_is_swept_once_it_is_written_down() -> None:
    model = settled()
    x, y = batch(5)
    G = jacfunc.ggn(model, F.cross_entropy)(x, y)
    assert num_sweeps(G.diagonal) == (BEFORE["calls"] < 16)


def test_all_answers_are_those_of_one_point() -> None:
    model = settled()
    x, y = batch(5)
    right, G = expected(model, x), jacfunc.ggn(model, F.cross_entropy)(x, y)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    model.last = nn.Linear(4, 2).double()
    assert_same(G.diagonal(), right)
    assert_same({name: block.diagonal() for name, block in G.blocks().items()}, _flat(right))
    assert_same(G.diagonal(), right)
    before = COUNT["evaluations"]
    G.diagonal()
    assert COUNT["evaluations"] == before  # what the blocks have kept is used again


def _flat(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: block.flatten() for name, block in named.items()}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change: str) -> None:
    model = settled()
    CHANGES[change](model)
    ggn = jacfunc.ggn(model, F.cross_entropy)
    for _ in range(2):
        x, y = batch(5)
        assert_same(ggn(x, y).diagonal(), expected(model, x))


@pytest.mark.parametrize("how", ["twice", "without a rule", "as a view", "looks", "goes apart"])
def test_another_course_is_taken_anew(how: str) -> None:
    model = settled()
    ggn = jacfunc.ggn(model, F.cross_entropy)
    for turn in (how, "", how, how, how, ""):
        HIDDEN["how"] = turn
        x, y = batch(5)
        assert_same(ggn(x, y).diagonal(), expected(model, x))


def test_outputs_that_differ_from_answer_to_answer_are_refused() -> None:
    model = settled()
    x, y = batch(5)
    G = jacfunc.ggn(model, F.cross_entropy)(x, y)
    G.diagonal()
    HIDDEN["how"] = "twice"
    with pytest.raises(NotImplementedError, match="ggn: "):
        G.blocks()


def test_targets_that_do_not_fit_are_refused_as_torch_does() -> None:
    model = settled()
    ggn = jacfunc.ggn(model, F.cross_entropy)
    x, y = batch(5)
    for _ in range(4):
        with pytest.raises(IndexError, match="out of bounds"):
            ggn(x, y + 7).diagonal()
    assert_same(ggn(x, y).diagonal(), expected(model, x))


def test_certain_samples_have_fewer_roots() -> None:
    model = settled()
    ggn = jacfunc.ggn(model, F.cross_entropy)
    x, y = batch(5)
    with torch.no_grad():
        model.last.bias[0] += 800.0  # of the second class no chance is left
    assert_same(ggn(x, y).diagonal(), expected(model, x))
    with torch.no_grad():
        model.last.bias[0] -= 800.0
    assert_same(ggn(x, y).diagonal(), expected(model, x))


def test_a_fisher_matrix_is_that_of_its_draws() -> None:
    fisher = jacfunc.fisher(Network(), "categorical", draws=3)
    for _ in range(BEFORE["calls"]):
        matrix = fisher(batch(5)[0])
        rows = matrix.matrix(chunk_size=4)  # by products of the whole batch
        diagonal = torch.cat([block.flatten() for block in matrix.diagonal().values()])
        torch.testing.assert_close(diagonal, rows.diagonal(), rtol=1e-10, atol=1e-12)
