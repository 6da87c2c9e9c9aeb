"""Normal equations of a matrix: the smaller side, memory that is short, and who solves."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from jacfunc._solving import Cholesky, ConjugateGradient, OneSide

double = torch.float64


class Matrix:
    """Both sides of a matrix, which counts how often it is asked for as a whole."""

    def __init__(self, rows: int, columns: int, room: int | None) -> None:
        self.dense, self.wholes = torch.randn(rows, columns, dtype=double), 0
        self.products: list[int] = []
        shared: Any = ("test", double, self.dense.device)
        pull, push = self._counted(self.dense), self._counted(self.dense.T)
        self.rows = OneSide(*shared, (rows, columns), pull, push, self._whole, room=room)
        self.columns = OneSide(
            *shared, (columns, rows), push, pull, lambda: self._whole().T, room=room
        )

    def _counted(self, matrix: Tensor) -> Any:
        def products(vectors: Tensor) -> Tensor:
            self.products.append(len(vectors))
            return vectors @ matrix

        return products

    def _whole(self) -> Tensor:
        self.wholes += 1
        return self.dense


def near(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).norm() <= 1e-9 * right.norm())


@pytest.mark.parametrize("room", [None, 0])
def test_a_gramian_without_the_matrix_where_memory_is_short(room: Any) -> None:
    matrix = Matrix(300, 7, room)
    assert near(matrix.columns.gram(double), matrix.dense.T @ matrix.dense)
    assert near(matrix.rows.gram(double), matrix.dense @ matrix.dense.T)
    assert matrix.wholes == (2 if room is None else 0)
    assert matrix.products == ([] if room is None else [7, 7, 256, 256, 44, 44])


@pytest.mark.parametrize("room", [None, 0])
def test_a_quadratic_form_without_the_matrix(room: Any) -> None:
    matrix, middle = Matrix(5, 7, room), torch.randn(7, 7, dtype=double)
    assert near(matrix.rows.quad(lambda v: v @ middle.T), matrix.dense @ middle @ matrix.dense.T)


def test_iterations_where_a_matrix_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    matrix, b = Matrix(6, 4, 0), torch.randn(1, 6, dtype=double)
    gram = matrix.dense @ matrix.dense.T + torch.eye(6, dtype=double)
    with caplog.at_level(logging.INFO, logger="jacfunc"):
        x = matrix.rows.solution(matrix.columns, 1.0, None)(b)
    assert (x @ gram - b).norm() <= 1e-7 * b.norm()
    assert "a matrix of 4 rows does not fit into memory" in caplog.text
    assert max(matrix.products) == 1


@pytest.mark.parametrize("count", [0, 3])
def test_no_equations(count: int) -> None:
    matrix = Matrix(0, 4, None)
    for solver in (Cholesky(), ConjugateGradient()):
        empty = torch.zeros(count, 0, dtype=double)
        assert matrix.rows.solution(matrix.columns, 0.0, solver)(empty).shape == (count, 0)
        ones = torch.ones(count, 4, dtype=double)
        assert near(matrix.columns.solution(matrix.rows, 2.0, solver)(ones), ones / 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rtol": 0.0}, "rtol must be a number between 0 and 1, got 0.0"),
        ({"rtol": "small"}, "rtol must be a number between 0 and 1, got 'small'"),
        ({"maxiter": 0}, "maxiter must be a positive number of products, got 0"),
        ({"maxiter": True}, "maxiter must be a positive number of products, got True"),
    ],
)
def test_options_of_iterations(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^ConjugateGradient: {words}"):
        ConjugateGradient(**options)
