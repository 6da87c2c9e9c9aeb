"""The algebra of linear operators: sums, scalings, compositions, restrictions; and the forms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from jacfunc.operators import LinearOperator, Space, linearize
from tests.operators.dense import Dense, normal

A, B = normal(4, 6, seed=1), normal(4, 6, seed=2)
C = normal(6, 3, seed=3)
V, U = normal(6, 5, seed=4), normal(4, 5, seed=5)
SQUARE = normal(4, 4, seed=6)

outer = (A + B)[[1]].T @ A[[2]]

COMBINED = {
    "itself": (lambda a, b, c: a, A),
    "sum": (lambda a, b, c: a + b, A + B),
    "difference": (lambda a, b, c: a - b, A - B),
    "negative": (lambda a, b, c: -a, -A),
    "scaled from the left": (lambda a, b, c: 2 * a, 2 * A),
    "scaled from the right": (lambda a, b, c: a * 0.5, 0.5 * A),
    "scaled by a tensor": (lambda a, b, c: torch.tensor(3.0) * a, 3 * A),
    "scaled by a number of NumPy": (lambda a, b, c: a * np.float64(2.5), 2.5 * A),
    "transposed": (lambda a, b, c: a.T, A.T),
    "transposed twice": (lambda a, b, c: a.T.T, A),
    "composed": (lambda a, b, c: a @ c, A @ C),
    "composed with a transpose": (lambda a, b, c: a @ b.T, A @ B.T),
    "composed thrice": (lambda a, b, c: c.T @ a.T @ b, C.T @ A.T @ B),
    "of all": (lambda a, b, c: (2 * a - b.T.T) @ c - 3 * (b @ c), (2 * A - B) @ C - 3 * B @ C),
    "rows": (lambda a, b, c: a.restrict(rows=[2, 0]), A[[2, 0]]),
    "a row twice": (lambda a, b, c: a.restrict(rows=[1, 1, -1]), A[[1, 1, 3]]),
    "rows by a tensor": (lambda a, b, c: a.restrict(rows=torch.tensor([3, -4])), A[[3, 0]]),
    "rows by a slice": (lambda a, b, c: a.restrict(rows=slice(None, None, 2)), A[::2]),
    "rows by a range": (lambda a, b, c: a.restrict(rows=range(1, 3)), A[1:3]),
    "columns": (lambda a, b, c: a.restrict(columns=[-1, 2]), A[:, [5, 2]]),
    "columns by a slice": (lambda a, b, c: a.restrict(columns=slice(-3, -1)), A[:, 3:5]),
    "both": (lambda a, b, c: a.restrict([0, 3], [1]), A[[0, 3]][:, [1]]),
    "none": (lambda a, b, c: a.restrict([], []), A[:0, :0]),
    "no rows": (lambda a, b, c: a.restrict(rows=slice(0, 0)), A[:0]),
    "restricted twice": (lambda a, b, c: a.restrict(slice(1, 4)).restrict([-1, 0]), A[[3, 1]]),
    "of a sum": (
        lambda a, b, c: (a + b).restrict([1]).T @ a.restrict([2]),
        (A + B)[[1]].T @ A[[2]],
    ),
}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", COMBINED)
def test_combinations_are_those_of_the_matrices(name):
    combine, expected = COMBINED[name]
    operator = combine(Dense(A), Dense(B), Dense(C))
    rows, columns = expected.shape
    assert operator.shape == (rows, columns)
    assert operator.dtype == expected.dtype
    assert operator.device == expected.device
    close(operator.matrix(), expected)
    many, covectors = normal(columns, 3), normal(rows, 3)
    close(operator @ many, expected @ many)
    close(operator.mm(many), expected @ many)
    close(operator.rmm(covectors), expected.T @ covectors)
    close(operator.T @ covectors, expected.T @ covectors)
    close(covectors.T @ operator, covectors.T @ expected)
    close(operator @ many[:, 0], expected @ many[:, 0])
    close(operator.rmv(covectors[:, 0]), expected.T @ covectors[:, 0])
    close(covectors[:, 0] @ operator, covectors[:, 0] @ expected)


def test_combinations_compute_nothing_until_they_are_multiplied():
    one, two = Dense(A), Dense(B)
    both = (2 * one - two).T @ one.restrict([0, 1, 2, 3])
    assert (one.pushed, one.pulled, two.pushed, two.pulled) == (0, 0, 0, 0)
    both @ V
    assert (one.pushed, one.pulled, two.pushed, two.pulled) == (5, 5, 0, 5)


def test_a_matrix_takes_products_of_its_smaller_side():
    wide, tall = Dense(A), Dense(A.T.contiguous())
    close(wide.matrix(), A)
    close(tall.matrix(), A.T)
    assert (wide.pushed, wide.pulled) == (0, 4)
    assert (tall.pushed, tall.pulled) == (4, 0)
    five = Dense(normal(300, 400))
    five.restrict(rows=range(5)).matrix()
    assert (five.pushed, five.pulled) == (0, 5)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 100])
def test_a_matrix_by_chunks(chunk_size):
    close(Dense(A).matrix(chunk_size=chunk_size), A)
    close(Dense(A).tree(chunk_size=chunk_size), A)


def tree_point() -> dict[str, Tensor]:
    return {"w": normal(2, 3), "b": normal(2, seed=1)}


def of_tree(tree: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return tree["w"].sin() @ torch.ones(3).double(), {"y": tree["b"] ** 2 * tree["w"].sum()}


def test_trees_and_flat_vectors_give_the_same_numbers():
    _, J = linearize(of_tree, tree_point())
    matrix = J.matrix()
    vector, covector = normal(8), normal(4)
    tree = J.domain.tree(vector)
    assert list(tree) == ["w", "b"]
    assert tree["w"].shape == (2, 3)
    out = J @ tree
    assert isinstance(out, tuple)
    close(J.codomain.flat(out), matrix @ vector)
    close(J @ vector, matrix @ vector)
    back = J.T @ J.codomain.tree(covector)
    close(J.domain.flat(back), matrix.T @ covector)
    close(covector @ J, covector @ matrix)
    close(J.domain.flat(J.codomain.tree(covector) @ J.T.T), covector @ matrix)
    # of many, trees have K in front of each leaf
    many = normal(8, 5)
    stacked = {"w": many[:6].T.reshape(5, 2, 3), "b": many[6:].T}
    first, second = J.mm(stacked)
    close(torch.cat([first.T, second["y"].T]), matrix @ many)
    close(J @ many, matrix @ many)
    cotangents = normal(4, 3)
    pulled = J.rmm((cotangents[:2].T, {"y": cotangents[2:].T}))
    close(torch.cat([pulled["w"].flatten(1).T, pulled["b"].T]), matrix.T @ cotangents)


def test_blocks_have_the_trees_of_both_sides():
    _, J = linearize(of_tree, tree_point())
    blocks = J.tree()
    assert isinstance(blocks, tuple)
    assert blocks[1]["y"]["w"].shape == (2, 2, 3)
    assert blocks[0]["b"].shape == (2, 2)
    close(blocks[0]["b"], torch.zeros(2, 2).double())
    flat = torch.cat([blocks[1]["y"]["w"].flatten(1), blocks[1]["y"]["b"]], 1)
    close(flat, J.matrix()[2:])


def test_leaves_are_named_as_code_names_them():
    _, J = linearize(of_tree, tree_point())
    assert J.domain.names == ("w", "b")
    assert J.codomain.names == ("0", "1.y")
    matrix = J.matrix()
    part = J.restrict(rows="1.*", columns="b")
    close(part.matrix(), matrix[2:, 6:])
    assert list(part.domain.tree(normal(2))) == ["b"]
    assert list(part @ {"b": normal(2)}) == ["1.y"]
    close(J.restrict(columns=["b", "w"]).matrix(), matrix)  # in the order of the tree
    close(J.restrict(rows=["0", "1.y"]).matrix(), matrix)
    close(J.restrict("*", "*").matrix(), matrix)


def test_a_lone_leaf_is_a_tree_and_many_vectors_are_a_matrix():
    point = normal(2, 3)
    _, J = linearize(lambda X: X.T @ X, point)
    vector = normal(2, 3, seed=1)
    assert (J @ vector).shape == (3, 3)
    assert (J @ vector.flatten()).shape == (9,)
    assert (J @ normal(6, 4)).shape == (9, 4)
    assert J.mm(normal(4, 2, 3)).shape == (4, 3, 3)
    close((J @ vector).flatten(), J.matrix() @ vector.flatten())
    close(J @ vector, vector.T @ point + point.T @ vector)
    assert (J.T @ torch.eye(3).double()).shape == (2, 3)


def test_scalars_have_operators_too():
    _, J = linearize(lambda x: x**3, torch.tensor(2.0))
    assert J.shape == (1, 1)
    assert J @ torch.tensor(1.0) == 12
    assert J.matrix().equal(torch.tensor([[12.0]]))
    _, gradient = linearize(lambda x: (x**2).sum(), torch.arange(3.0))
    assert gradient @ torch.ones(3) == 6
    assert gradient.rmv(torch.tensor(1.0)).equal(torch.tensor([0.0, 2.0, 4.0]))


def test_dtypes_of_leaves_may_differ():
    point = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3)}
    _, J = linearize(lambda t: {"u": t["b"] * 2, "v": t["a"] * t["b"].sum()}, point)
    assert J.domain.dtype == J.codomain.dtype == J.dtype == torch.float64
    out = J @ {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3)}
    assert out["u"].dtype == torch.float32
    assert out["v"].dtype == torch.float64
    assert (J @ normal(5)).dtype == torch.float64
    matrix = J.matrix()
    close(J @ torch.ones(5).double(), matrix @ torch.ones(5).double())
    _, widened = linearize(lambda x: x.double() * 2, torch.ones(3))
    assert widened.dtype == torch.float64
    assert (widened @ torch.ones(3)).dtype == torch.float64
    assert widened.rmv(torch.ones(3).double()).dtype == torch.float32


def test_constants_stay_what_they_are():
    point = {"x": normal(3), "index": torch.tensor([2, 0]), "word": "y", "none": None}
    value, J = linearize(lambda t: {"y": t["x"][t["index"]] * 2, "count": t["index"]}, point)
    assert J.shape == (2, 3)
    out = J @ {"x": normal(3), "index": None, "word": None, "none": None}
    assert out["count"] is None
    close(out["y"], 2 * normal(3)[[2, 0]])
    assert value["count"].equal(torch.tensor([2, 0]))
    assert J.T.mv({"y": normal(2), "count": None})["index"] is None


def test_operators_may_not_be_added_or_multiplied_by_other_things():
    for combine in (
        lambda a: a + 1,
        lambda a: 1 - a,
        lambda a: a * "x",
        lambda a: a * torch.ones(2),
        lambda a: a * a,
        lambda a: 1j * a,
        lambda a: a * torch.tensor(1j),
    ):
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
            combine(Dense(SQUARE))


def test_numbers_on_their_left_do_not_take_them_for_sequences():
    """NumPy and torch ask their right-hand sides first."""
    for other in (np.ones(2), np.ones((2, 4))):
        with pytest.raises(TypeError, match="unsupported operand"):
            other * Dense(A)
    with pytest.raises(ValueError, match=r"vector must match in shape.*got ndarray"):
        np.ones(4) @ Dense(A)
    for factor in (np.float32(2), np.int64(2), torch.tensor(2.0, dtype=torch.float64)):
        operator = factor * Dense(A)
        assert isinstance(operator, LinearOperator)
        close(operator.matrix(), 2 * A)
    rows = normal(2, 4)
    assert torch.is_tensor(rows @ Dense(A))


def test_spaces_agree_by_shapes_and_dtypes():
    _, J = linearize(lambda x: x.sin(), normal(4))
    close((Dense(SQUARE) @ J).matrix(), SQUARE @ J.matrix())
    _, single = linearize(lambda x: x.sin(), torch.ones(4))
    for combine in (lambda: Dense(SQUARE) @ single, lambda: J + single):
        with pytest.raises(ValueError, match=r"two operators must agree on the vectors.*got Space"):
            combine()


def test_spaces_say_what_they_are():
    space = Space.of(tree_point())
    assert (space.size, space.dtype, space.device.type) == (8, torch.float64, "cpu")
    assert repr(space) == "Space(8 numbers: (2, 3), (2,))"
    assert repr(Dense(A)) == "Dense(4 × 6, torch.float64)"
    assert all(leaf.stride() == (0,) * leaf.dim() for leaf in space.leaves)
    close(space.flat(space.tree(normal(8))), normal(8))


def test_an_operator_can_be_copied():
    operator = copy.copy(Dense(A))
    close(operator.matrix(), A)


def test_products_follow_their_vectors():
    vector = normal(6).requires_grad_()
    operator = 2 * Dense(A).restrict([0, 2])
    (slope,) = torch.autograd.grad((operator @ vector) @ torch.ones(2).double(), vector)
    close(slope, 2 * A[[0, 2]].sum(0))
    mapped = torch.vmap(lambda v: operator @ v)(normal(3, 6))
    close(mapped, 2 * normal(3, 6) @ A[[0, 2]].T)
    _, pushed = torch.func.jvp(lambda v: operator @ v, (normal(6),), (normal(6, seed=9),))
    close(pushed, 2 * A[[0, 2]] @ normal(6, seed=9))
