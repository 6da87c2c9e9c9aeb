"""``linearize``: one evaluation, one point, one mask; what it keeps; transforms and threads."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc.operators import linearize
from tests.operators.dense import normal

A = normal(3, 4, seed=1)
X, V, U = normal(4, seed=2), normal(4, seed=3), normal(3, seed=4)
JACOBIAN = (1 - torch.tanh(A @ X) ** 2)[:, None] * A


class Counted:
    """``tanh(A x)``, which counts its evaluations, and whose intermediates can be watched."""

    def __init__(self) -> None:
        self.calls = 0
        self.inner: weakref.ref[Tensor] = weakref.ref(A)

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = (A @ x).exp()
        self.inner = weakref.ref(hidden)
        return torch.tanh(hidden.log())


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --- what it evaluates, and keeps ---


def test_it_evaluates_once():
    func = Counted()
    value, _ = linearize(func, X)
    assert func.calls == 1
    close(value, torch.tanh(A @ X))


def test_reverse_products_never_evaluate_again():
    func = Counted()
    _, J = linearize(func, X)
    for _ in range(5):
        close(J.T @ U, JACOBIAN.T @ U)
        close(J.T @ normal(3, 6), JACOBIAN.T @ normal(3, 6))
    close(J.matrix(), JACOBIAN)
    assert func.calls == 1


def test_mixed_products_settle():
    """After one of each, on the graph of the pullback."""
    func = Counted()
    _, J = linearize(func, X)
    J @ V
    J.T @ U
    settled = func.calls
    assert settled <= 3
    for _ in range(4):
        close(J @ V, JACOBIAN @ V)
        close(J.T @ U, JACOBIAN.T @ U)
        close(J @ normal(4, 3), JACOBIAN @ normal(4, 3))
    assert func.calls == settled
    after_a_pull = Counted()
    _, J = linearize(after_a_pull, X)
    J.T @ U
    J @ V
    J @ normal(4, 3)
    assert after_a_pull.calls == 1


def test_who_only_pushes_keeps_no_graph():
    func = Counted()
    _, J = linearize(func, X)
    assert func.inner() is not None  # the graph of the evaluation
    J @ V
    assert func.inner() is None
    packed = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal packed
        packed += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.no_grad():
        for _ in range(3):
            close(J @ V, JACOBIAN @ V)
            close(J @ normal(4, 2), JACOBIAN @ normal(4, 2))
            assert func.inner() is None
    assert packed == 0
    assert func.calls == 8


def test_a_push_is_one_evaluation():
    func = Counted()
    _, J = linearize(func, X)
    J @ V
    J @ normal(4, 7)
    assert func.calls == 3


# --- value and products are of one evaluation ---


def test_value_and_product_have_one_dropout_mask():
    """The function is linear, so that J x is the value; torch.func.linearize draws twice."""

    def dropped(x: Tensor) -> Tensor:
        return F.dropout(x * torch.ones(50).double()[:, None], 0.5).flatten()

    for order in ("push", "pull", "both"):
        value, J = linearize(dropped, X)
        if order != "push":
            close(J.T @ torch.ones(200).double(), J.matrix().sum(0))
            close((J.T @ value) @ X, value @ value)
        if order != "pull":
            for _ in range(2):
                torch.rand(3)
                close(J @ X, value)
                close(J @ torch.stack([X, 2 * X], 1), torch.stack([value, 2 * value], 1))
        assert 20 < (value == 0).sum() < 180


def test_random_generators_are_left_alone():
    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand(4)

    torch.manual_seed(3)
    expected = noisy(X)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    value, J = linearize(noisy, X)
    close(value, expected)  # it draws what the function would have drawn
    assert torch.get_rng_state().equal(after)
    for product in (lambda: J @ V, lambda: J.T @ V, J.matrix, lambda: J @ normal(4, 2)):
        product()
        assert torch.get_rng_state().equal(after)
    close(J @ X, value)


def test_it_answers_from_the_point_at_which_it_was_made():
    point = X.clone()
    value, J = linearize(lambda x: torch.tanh(A @ x), point)
    point.mul_(5)
    value.zero_()
    close(J @ V, JACOBIAN @ V)
    close(J.T @ U, JACOBIAN.T @ U)
    close(J.matrix(), JACOBIAN)


def test_several_primals_and_aux():
    def func(x: Tensor, tree: dict[str, Tensor]) -> tuple[Tensor, Any]:
        return A @ x * tree["b"], {"norm": x.norm(), "word": "any"}

    tree = {"b": U}
    value, J, aux = linearize(func, X, tree, has_aux=True)
    assert aux["word"] == "any"
    close(aux["norm"], X.norm())
    assert not aux["norm"].requires_grad
    close(value, A @ X * U)
    assert J.domain.names == ("0", "1.b")
    close(J @ (V, {"b": U}), A @ V * U + A @ X * U)
    first, second = J.T @ U
    close(first, A.T @ (U * U))
    close(second["b"], U * (A @ X))
    close(J.matrix(), torch.cat([U[:, None] * A, torch.diag(A @ X)], 1))


def test_infinite_derivatives_do_not_spoil_others():
    _, J = linearize(lambda x, y: (x.sqrt(), y * 2), torch.zeros(2), torch.ones(2))
    zero, two = J.T @ (torch.zeros(2), torch.ones(2))
    assert zero.equal(torch.zeros(2))
    assert two.equal(torch.full((2,), 2.0))
    assert J.T.matrix().diagonal().equal(torch.tensor([torch.inf, torch.inf, 2.0, 2.0]))


def test_zero_vectors_have_zero_products():
    _, J = linearize(lambda x: (torch.tanh(A @ x), x.sum()), X)
    for size in (1, 3):
        assert not (J @ torch.zeros(4, size).double()).any()
        assert not (J.T @ torch.zeros(4, size).double()).any()


def test_no_vectors_have_no_products():
    _, J = linearize(lambda x: torch.tanh(A @ x), X)
    assert (J @ torch.zeros(4, 0).double()).shape == (3, 0)
    assert (J.T @ torch.zeros(3, 0).double()).shape == (4, 0)


# --- derivatives of products ---


def test_a_derivative_through_a_product_where_torch_func_gives_uninitialised_memory():
    """``torch.func.linearize`` of ``x³``, differentiated by x, gives numbers such as 1e-309."""

    def slope(x: Tensor) -> Tensor:
        _, J = linearize(lambda x: x**3, x)
        return (J @ torch.ones_like(x)).sum()

    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    for gradient in (torch.autograd.grad(slope(x), x)[0], torch.func.grad(slope)(x.detach())):
        close(gradient, 6 * x.detach())


def test_a_loss_of_products_trains_the_function():
    weight = A.clone().requires_grad_()
    _, J = linearize(lambda x: torch.tanh(weight @ x), X)
    # by hand: d/dW ‖diag(1 - tanh²) W v‖²
    other = A.clone().requires_grad_()
    expected = (((1 - torch.tanh(other @ X) ** 2)[:, None] * other) @ V).square().sum()
    (by_push,) = torch.autograd.grad((J @ V).square().sum(), weight)
    close(by_push, torch.autograd.grad(expected, other)[0])
    expected = (((1 - torch.tanh(other @ X) ** 2)[:, None] * other).T @ U).square().sum()
    (by_pull,) = torch.autograd.grad((J.T @ U).square().sum(), weight)
    close(by_pull, torch.autograd.grad(expected, other)[0])


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "ours": jacfunc.jacobian,
    "vmap of grad": lambda f: (
        lambda x: torch.stack(
            [torch.func.grad(lambda x, i=i: f(x)[i])(x) for i in range(len(f(x)))]
        )
    ),
}


def second() -> Tensor:
    """``[M, N, N]`` of ``tanh(A x)``."""
    y = torch.tanh(A @ X)
    return torch.einsum("i,ij,ik->ijk", -2 * y * (1 - y**2), A, A)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_products_by_the_point(name):
    derive = TRANSFORMS[name]

    def func(x: Tensor) -> Tensor:
        return torch.tanh(A @ x)

    close(derive(lambda x: linearize(func, x)[1] @ V)(X), torch.einsum("ijk,j->ik", second(), V))
    close(derive(lambda x: linearize(func, x)[1].T @ U)(X), torch.einsum("ijk,i->jk", second(), U))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("was_pulled", [False, True])
def test_transforms_of_products_by_the_vector(name, was_pulled):
    derive = TRANSFORMS[name]
    _, J = linearize(lambda x: torch.tanh(A @ x), X)
    if was_pulled:
        J.T @ U
    close(derive(lambda v: J @ v)(V), JACOBIAN)
    close(derive(lambda u: J.T @ u)(U), JACOBIAN.T)


def test_vmap_over_points_and_over_vectors():
    points, vectors = normal(5, 4), normal(5, 4, seed=8)

    def func(x: Tensor) -> Tensor:
        return torch.tanh(A @ x)

    mapped = torch.vmap(lambda x, v: linearize(func, x)[1] @ v)(points, vectors)
    close(
        mapped,
        torch.stack([linearize(func, x)[1] @ v for x, v in zip(points, vectors, strict=True)]),
    )
    _, J = linearize(func, X)
    close(torch.vmap(lambda v: J @ v)(vectors), vectors @ JACOBIAN.T)
    close(torch.vmap(lambda u: J.T @ u)(normal(5, 3)), normal(5, 3) @ JACOBIAN)
    matrices = torch.vmap(lambda x: linearize(func, x)[1].matrix())(points)
    close(matrices, torch.stack([linearize(func, x)[1].matrix() for x in points]))


def test_vmap_over_cotangents_of_several_outputs():
    _, J = linearize(lambda x: (torch.tanh(A @ x), x.sum()), X)
    whole = torch.cat([JACOBIAN, torch.ones(1, 4).double()])
    cotangents = normal(5, 4)
    cotangents[1, :3] = 0
    close(torch.vmap(lambda u: J.T @ u)(cotangents), cotangents @ whole)
    close(torch.func.jacrev(lambda u: J.T @ u)(cotangents[0]), whole.T)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_without_grad_mode(mode):
    with mode():
        value, J = linearize(lambda x: torch.tanh(A @ x), X)
        close(J @ V, JACOBIAN @ V)
        close(J.T @ U, JACOBIAN.T @ U)
        close(J @ V, JACOBIAN @ V)
    assert not value.requires_grad
    close(J.matrix(), JACOBIAN)


def test_results_carry_no_graph_where_nothing_is_followed():
    value, J = linearize(lambda x: torch.tanh(A @ x), X)
    for result in (value, J @ V, J.T @ U, J @ V, J.matrix(), J @ normal(4, 2)):
        assert not result.requires_grad


def test_products_can_be_differentiated_after_some_that_were_not():
    point = X.clone().requires_grad_()
    _, J = linearize(lambda x: torch.tanh(A @ x), point)
    with torch.no_grad():
        for product in (J @ V, J.T @ U, J @ V):
            assert not product.requires_grad
    for number in ((J.T @ U) @ V, U @ (J @ V), U @ J.matrix() @ V):
        (slope,) = torch.autograd.grad(number, point, retain_graph=True)
        close(slope, torch.einsum("ijk,i,j->k", second(), U, V))


@pytest.mark.parametrize("order", ["push", "pull", "push after pull"])
@pytest.mark.parametrize("is_inside", [True, False])
def test_products_are_cast_as_the_value_was(order, is_inside):
    """Autocast as it was at the point, whatever it is where products are asked for."""
    single, point = A.float(), X.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_inside):
        value, J = linearize(lambda x: single @ x, point)
        same = torch.stack([single @ unit for unit in torch.eye(4)], 1)
    assert value.dtype == (torch.bfloat16 if is_inside else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_inside):
        if order != "push":
            u = torch.ones(3, dtype=value.dtype)
            torch.testing.assert_close(J.T @ u, same.float().sum(0), rtol=0.01, atol=0.05)
        if order != "pull":
            product = J @ torch.ones(4)
            assert product.dtype == value.dtype
            rtol = 0.02 if is_inside else 1e-6
            torch.testing.assert_close(product.float(), same.float().sum(1), rtol=rtol, atol=rtol)


# --- functions that change ---

STATE = torch.ones(4, dtype=torch.float64)
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda state: state.mul_(2),
    "through .data": lambda state: state.data.mul_(2),
    "by NumPy": lambda state: state.numpy().__imul__(2),
    "under no_grad": lambda state: torch.no_grad()(state.add_)(1),
}


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_function_that_has_changed_is_refused(name, is_global):
    STATE.fill_(1.0)
    local = torch.ones(4, dtype=torch.float64)
    func = (lambda x: x.sin() * STATE) if is_global else (lambda x: x.sin() * local)
    _, J = linearize(func, X)
    close(J @ V, X.cos() * V)
    CHANGES[name](STATE if is_global else local)
    for product in (lambda: J @ V, lambda: J.T @ V, J.matrix):
        with pytest.raises(ValueError, match=r"^linearize: what the function closes over"):
            product()


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "coo, a place twice": lambda A: torch.sparse_coo_tensor(
        [[0, 0, 1], [1, 1, 0]], torch.ones(3), A.shape, dtype=A.dtype, check_invariants=True
    ),
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC) tensor support is in beta")
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_tensors_are_compared_too(name):
    """Torch compares no sparse tensors, so what these are kept in is compared."""
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    A = SPARSE[name](dense)
    dense = A.to_dense()
    _, J = linearize(lambda x: (A @ x).sin(), X)
    expected = (dense @ X).cos()[:, None] * dense
    for _ in range(2):
        close(J @ V, expected @ V)
        close(J.T @ torch.ones(2).double(), expected.sum(0))
        close(J.matrix(), expected)
    (A._values() if A.is_sparse else A.values()).mul_(2)
    with pytest.raises(ValueError, match=r"^linearize: what the function closes over"):
        J.matrix()


def test_a_function_that_computes_something_else_is_refused_for_good():
    """What it refers to was replaced: of that nothing tells but its outputs."""

    class Box:
        factor = 2.0

    box = Box()
    _, J = linearize(lambda x: x * box.factor, X)
    box.factor = 3.0
    for product in (lambda: J @ V, lambda: J.T @ V, J.matrix, lambda: J @ V):
        with pytest.raises(NotImplementedError, match="its outputs change from one evaluation"):
            product()
    box.factor = 2.0
    close(J @ V, 2 * V)


def test_a_module_that_is_trained_after_it_is_refused():
    layer = nn.Linear(4, 3).double()
    _, J = linearize(lambda x: layer(x).tanh(), X)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(ValueError, match="closes over must stay as it was"):
        J.T @ U


def test_products_leave_the_buffers_of_a_module_alone():
    norm = nn.BatchNorm1d(4).double()
    batch = normal(5, 4)
    _, J = linearize(lambda x: norm(x), batch)
    after_one = norm.running_mean.clone()
    for _ in range(2):
        J @ normal(5, 4, seed=1)
        close(norm.running_mean, after_one)
        assert norm.num_batches_tracked == 1


def test_hooks_change_pullbacks_and_pushes_or_are_refused():
    """A hook that doubles a cotangent changes Jᵀ u; torch pushes past it."""

    def hooked(x: Tensor) -> Tensor:
        y = torch.tanh(A @ x)
        y.register_hook(lambda cotangent: 2 * cotangent)
        return 1 * y

    _, J = linearize(hooked, X)
    close(J.T @ U, 2 * JACOBIAN.T @ U)
    close(J @ V, 2 * JACOBIAN @ V)  # on the graph of the pullback
    _, J = linearize(hooked, X)
    close(J @ V, 2 * JACOBIAN @ V)
    close(J.T @ U, 2 * JACOBIAN.T @ U)


# --- threads ---


def test_threads_share_an_operator():
    _, J = linearize(lambda x: torch.tanh(A @ x), X)
    vectors = normal(24, 4)

    def both(v: Tensor) -> tuple[Tensor, Tensor]:
        return J @ v, J.T @ v[:3]

    with ThreadPoolExecutor(4) as pool:
        for (pushed, pulled), v in zip(pool.map(both, vectors), vectors, strict=True):
            close(pushed, JACOBIAN @ v)
            close(pulled, JACOBIAN.T @ v[:3])


def test_threads_make_operators_of_their_own():
    points = normal(16, 4)

    def product(x: Tensor) -> Tensor:
        _, J = linearize(lambda x: torch.tanh(A @ F.dropout(x, 0.0)), x)
        return J @ V

    with ThreadPoolExecutor(4) as pool:
        for pushed, x in zip(pool.map(product, points), points, strict=True):
            close(pushed, (1 - torch.tanh(A @ x) ** 2) * (A @ V))


def test_outputs_that_are_rounding_alone() -> None:
    """A gradient at a minimum is zero but for rounding, which differs between ways to evaluate."""
    torch.manual_seed(0)
    A, y = torch.randn(400, 30, dtype=torch.float64), (torch.rand(400) < 0.5).double()

    def objective(w: Tensor) -> Tensor:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(A @ w, y, reduction="sum")
        return loss + w.square().sum() / 2

    def hessian(w: Tensor) -> Tensor:
        slopes = torch.sigmoid(A @ w)
        return A.T @ (A * (slopes * (1 - slopes))[:, None]) + torch.eye(30, dtype=torch.float64)

    w = torch.zeros(30, dtype=torch.float64)
    for _ in range(20):
        w = w - torch.linalg.solve(hessian(w), A.T @ (torch.sigmoid(A @ w) - y) + w)
    for gradient_of in (jacfunc.jacrev(objective), torch.func.grad(objective)):
        _, operator = jacfunc.linearize(gradient_of, w)
        v = torch.randn(30, dtype=torch.float64)
        torch.testing.assert_close(operator @ v, hessian(w) @ v)
        torch.testing.assert_close(operator.T @ v, hessian(w) @ v)
        torch.testing.assert_close(operator.matrix(), hessian(w))


def test_small_outputs_that_change_are_refused() -> None:
    count = 0

    def func(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x.sin() * 1e-16 * count

    _, J = jacfunc.linearize(func, torch.ones(3, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="outputs change from one evaluation"):
        J @ torch.ones(3, dtype=torch.float64)
