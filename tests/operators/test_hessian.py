"""The Hessian of a function over trees as an operator, on the graph of its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.nn import functional as F

import jacfunc
from tests.functions.test_second import Squared, saved_in
from tests.truth.oracles import assert_same, finite_differences, looped_hessian

A = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1])
KEYS = ("w", "b", "s")


def loss(params: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(torch.tanh(A @ params["w"] + params["b"]) * params["s"], LABELS)


def point() -> dict[str, Tensor]:
    shapes = {"w": (4, 3), "b": (3,), "s": ()}
    generator = torch.Generator().manual_seed(2)
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return {**drawn, "n": torch.arange(2)}


def looped(params: dict[str, Tensor]) -> Tensor:
    """``[N, N]``, by two loops of ``autograd.grad``."""
    blocks = looped_hessian(loss, (params,))
    rows = [torch.cat([blocks[i][j].reshape(params[i].numel(), -1) for j in KEYS], 1) for i in KEYS]
    return torch.cat(rows)


def test_products_blocks_and_matrix_are_those_of_the_loops() -> None:
    params = point()
    want = looped(params)
    value, hess = jacfunc.hessian_operator(loss, params)
    assert_same(value, loss(params))
    assert_same(hess.value, loss(params))
    assert hess.shape == (16, 16)
    torch.testing.assert_close(hess.matrix(), want)
    torch.testing.assert_close(hess.matrix(chunk_size=3), want)
    many = torch.randn(16, 4, dtype=torch.float64)
    torch.testing.assert_close(hess @ many, want @ many)
    torch.testing.assert_close(hess.T @ many[:, 0], want.T @ many[:, 0])
    vector = {"w": many[:12, 1].view(4, 3), "b": many[12:15, 1], "s": many[15, 1], "n": None}
    product = hess @ vector
    torch.testing.assert_close(product["w"].flatten(), want[:12] @ many[:, 1])
    assert product["n"] is None
    blocks, diagonal = hess.blocks(chunk_size=5), hess.diagonal(chunk_size=5)
    torch.testing.assert_close(blocks["w"], want[:12, :12])
    torch.testing.assert_close(blocks["s"], want[15:, 15:])
    torch.testing.assert_close(diagonal["b"], want.diagonal()[12:15])
    assert diagonal["s"].shape == ()
    assert diagonal["w"].shape == (4, 3)
    torch.testing.assert_close(hess["w", "b"].matrix(), want[:12, 12:15])
    torch.testing.assert_close(hess[[3, -1], "s"].matrix(), want[[3, 15], 15:])
    assert_same(hess.tree()["b"]["w"], looped_hessian(loss, (params,))["b"]["w"])


def test_gradient_is_that_of_differences() -> None:
    params = point()
    _, hess = jacfunc.hessian_operator(loss, params)
    assert_same(hess.gradient(), finite_differences(loss, (params,)), rtol=1e-6, atol=1e-8)


def test_products_never_evaluate_again() -> None:
    calls = []

    def counted(params: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return loss(params)

    _, hess = jacfunc.hessian_operator(counted, point())
    for _ in range(5):
        hess @ torch.ones(16, dtype=torch.float64)
    hess.blocks(), hess.matrix(), hess.gradient()
    assert len(calls) == 1


def test_products_keep_no_graph_of_their_own() -> None:
    _, hess = jacfunc.hessian_operator(loss, point())
    vector = torch.ones(16, dtype=torch.float64)
    assert saved_in(lambda: hess @ vector) == 0
    assert saved_in(hess.matrix) == 0
    assert not (hess @ vector).requires_grad


def test_it_answers_from_its_point() -> None:
    params = point()
    _, hess = jacfunc.hessian_operator(loss, params)
    before = hess.matrix()
    params["w"].zero_()
    assert torch.equal(hess.matrix(), before)


def test_what_the_function_closes_over_must_stay() -> None:
    scale = torch.ones(3, dtype=torch.float64)
    _, hess = jacfunc.hessian_operator(lambda x: (x**3 * scale).sum(), A[0, :3].clone())
    scale.mul_(2)
    with pytest.raises(ValueError, match=r"^hessian_operator: .*changed"):
        hess @ scale


def test_several_primals_and_aux() -> None:
    func = lambda x, y: ((x**2 * y).sum(), "any object")  # noqa: E731
    _, hess, aux = jacfunc.hessian_operator(func, A[0], A[1], has_aux=True)
    assert aux == "any object"
    in_x, in_y = hess @ (torch.ones_like(A[0]), torch.zeros_like(A[1]))
    torch.testing.assert_close(in_x, 2 * A[1])
    torch.testing.assert_close(in_y, 2 * A[0])


def test_one_mask_for_value_and_products() -> None:
    x = torch.ones(32, dtype=torch.float64)
    value, hess = jacfunc.hessian_operator(lambda x: F.dropout(x, 0.5).pow(2).sum(), x)
    diagonal = hess.diagonal()
    assert torch.equal(diagonal, hess.matrix().diagonal())
    assert torch.equal(value, (diagonal / 2).sum())


def test_differentiable_by_vector_and_point() -> None:
    v = A[1].clone().requires_grad_()
    _, hess = jacfunc.hessian_operator(lambda x: x.pow(4).sum(), A[0])
    (by_v,) = torch.autograd.grad((hess @ v).sum(), v)
    torch.testing.assert_close(by_v, 12 * A[0] ** 2)
    jac = torch.func.jacrev(lambda v: hess @ v)(A[1])
    torch.testing.assert_close(jac, torch.diag(12 * A[0] ** 2))
    torch.testing.assert_close(torch.func.vmap(lambda v: hess @ v)(A), 12 * A[0] ** 2 * A)
    x = A[0].clone().requires_grad_()
    _, hess = jacfunc.hessian_operator(lambda x: x.pow(4).sum(), x)
    by_x, by_v = torch.autograd.grad((hess @ v).sum(), (x, v))
    torch.testing.assert_close(by_x, 24 * x * v)
    torch.testing.assert_close(by_v, 12 * x**2)


def test_an_infinite_second_derivative_spoils_no_other_leaf() -> None:
    def func(x: Tensor, y: Tensor) -> Tensor:
        return x.abs().pow(1.5).sum() + y.square().sum()

    _, hess = jacfunc.hessian_operator(func, torch.zeros(2), torch.ones(2))
    torch.testing.assert_close(hess.blocks()[1], 2 * torch.eye(2))


def test_without_a_second_backward_pass() -> None:
    def func(x: Tensor, y: Tensor) -> Tensor:
        return (Squared.apply(x) * x).sum() * y

    x, y = A[0].clone(), A[0, 1].clone()
    want = torch.diag(torch.cat([6 * x * y, torch.zeros(1)]))
    want[:4, 4] = want[4, :4] = 3 * x**2
    _, hess = jacfunc.hessian_operator(func, x, y)
    torch.testing.assert_close(hess.matrix(), want)
    torch.testing.assert_close(hess.blocks()[0], want[:4, :4])
    torch.testing.assert_close(hess.gradient()[0], 3 * x**2 * y)


def test_algebra_and_scipy() -> None:
    params = point()
    want, (_, hess) = looped(params), jacfunc.hessian_operator(loss, params)
    torch.testing.assert_close((hess @ hess - 2 * hess).matrix(), want @ want - 2 * want)
    largest = eigsh(hess.to_scipy(), k=1, which="LA", return_eigenvectors=False)
    torch.testing.assert_close(torch.tensor(largest[0]), torch.linalg.eigvalsh(want)[-1])


@pytest.mark.parametrize("inside", [torch.func.vmap, jacfunc.vmap])
def test_inside_a_vmap(inside: Any) -> None:
    def product(x: Tensor) -> Tensor:
        return jacfunc.hessian_operator(lambda x: x.pow(3).sum(), x)[1] @ torch.ones_like(x)

    torch.testing.assert_close(inside(product)(A), 6 * A)


def test_empty_leaves() -> None:
    x, nothing = A[0].clone(), torch.ones(0, dtype=torch.float64)
    _, hess = jacfunc.hessian_operator(lambda x, y: x.pow(3).sum() + y.sum(), x, nothing)
    blocks = hess.blocks()
    torch.testing.assert_close(blocks[0], torch.diag(6 * x))
    assert blocks[1].shape == (0, 0)
    assert hess.diagonal()[1].shape == (0,)
    torch.testing.assert_close(hess.matrix(), torch.diag(6 * x))


def test_batch_normalization_that_the_function_closes_over_writes_once():
    """The evaluation writes into its buffers; products answer from before, and write no more."""
    norm = torch.nn.BatchNorm1d(4).double()
    batch, vector = torch.randn(2, 5, 4, dtype=torch.float64)
    number = lambda x: torch.tanh(norm(x)).square().sum()  # noqa: E731
    _, H = jacfunc.hessian_operator(number, batch)
    after_one = norm.running_mean.clone()
    products = [H @ vector for _ in range(2)]
    torch.testing.assert_close(norm.running_mean, after_one, rtol=0, atol=0)
    assert norm.num_batches_tracked == 1
    hessian = looped_hessian(number, (batch,)).view(20, 20)
    for product in products:
        assert_same(product.flatten(), hessian @ vector.flatten())


@pytest.mark.parametrize("is_inside", [True, False])
def test_products_by_evaluations_are_cast_as_the_value_was(is_inside):
    """What has one derivative alone is evaluated again for each product."""
    weight, vector = torch.randn(3, 3), torch.ones(3)

    def number(x: Tensor) -> Tensor:
        y = weight @ x
        return (Squared.apply(y) * y).float().sum()

    with torch.autocast("cpu", torch.bfloat16, enabled=is_inside):
        _, H = jacfunc.hessian_operator(number, vector)
        same = H @ vector
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_inside):
        torch.testing.assert_close(H @ vector, same, rtol=0, atol=0)
