"""A pullback is a function of its cotangent: differentiated, pushed forward, mapped, anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import jacfunc
from jacfunc._errors import Refused
from tests.kinds.programs import OnceDifferentiable
from tests.truth.oracles import assert_same, looped_jacobian

D = torch.float64
A = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.5, -1.0, 2.0], [2.0, 0.3, 0.7, -0.4]], dtype=D)
X = torch.tensor([0.3, -0.2, 0.6, 0.1], dtype=D)
U = torch.tensor([0.7, -1.1, 0.4], dtype=D)
Map = Callable[[Tensor], Tensor]


def linear(x: Tensor) -> Tensor:
    return A @ x


def curved(x: Tensor) -> Tensor:
    return torch.tanh(A @ x)


def normed(x: Tensor) -> Tensor:
    return A @ nn.functional.layer_norm(x, (4,))


def determined(x: Tensor) -> Tensor:
    return A[:, 0] * torch.linalg.det(x.reshape(2, 2))


class Sine(torch.autograd.Function):
    """Without what functorch asks of a Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent * ctx.saved_tensors[0].cos()


def by_a_function(x: Tensor) -> Tensor:
    return A @ Sine.apply(x)


def rows(func: Map, x: Tensor) -> Tensor:
    """J by a loop of plain backward passes."""
    jacobian: Tensor = looped_jacobian(func, (x.detach(),))
    return jacobian


def pullback_of(func: Map, x: Tensor) -> Map:
    _, pull = jacfunc.vjp(func, x)
    return lambda u: pull(u)[0]


def made_inside(func: Map, x: Tensor) -> Map:
    return lambda u: jacfunc.vjp(func, x)[1](u)[0]


def under_no_grad(func: Map, x: Tensor) -> Map:
    with torch.no_grad():
        return pullback_of(func, x)


def plain_rows(pull: Map) -> Map:
    def derivative(u: Tensor) -> Tensor:
        point = u.detach().requires_grad_()
        products = pull(point)
        return torch.stack([torch.autograd.grad(y, point, retain_graph=True)[0] for y in products])

    return derivative


def by_vjp(vjp: Any) -> Callable[[Map], Map]:
    def derivative_of(pull: Map) -> Map:
        def derivative(u: Tensor) -> Tensor:
            _, back, *_ = vjp(pull, u)
            return torch.stack([back(e)[0] for e in torch.eye(4, dtype=D)])

        return derivative

    return derivative_of


def by_jvp(jvp: Any) -> Callable[[Map], Map]:
    def derivative_of(pull: Map) -> Map:
        return lambda u: torch.stack([jvp(pull, (u,), (e,))[1] for e in torch.eye(3, dtype=D)], 1)

    return derivative_of


def dual_columns(pull: Map) -> Map:
    def derivative(u: Tensor) -> Tensor:
        columns = []
        for unit in torch.eye(3, dtype=D):
            with forward_ad.dual_level():
                product = pull(forward_ad.make_dual(u, unit))
                columns.append(forward_ad.unpack_dual(product).tangent)
        return torch.stack(columns, 1)

    return derivative


def torch_gradients(pull: Map) -> Map:
    return lambda u: torch.stack([torch.func.grad(lambda u, i=i: pull(u)[i])(u) for i in range(4)])


DOORS = {
    "jacrev": jacfunc.jacrev,
    "jacfwd": jacfunc.jacfwd,
    "auto": jacfunc.jacobian,
    "looped": lambda f: jacfunc.jacobian(f, strategy="looped"),
    "value": lambda f: lambda u: jacfunc.value_and_jacobian(f)(u)[1],
    "vjp": by_vjp(jacfunc.vjp),
    "jvp": by_jvp(jacfunc.jvp),
    "torch.jacrev": torch.func.jacrev,
    "torch.jacfwd": torch.func.jacfwd,
    "torch.grad": torch_gradients,
    "torch.vjp": by_vjp(torch.func.vjp),
    "torch.jvp": by_jvp(torch.func.jvp),
    "autograd": plain_rows,
    "duals": dual_columns,
}
EVERY_DOOR = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
REVERSE = pytest.mark.parametrize("door", [jacfunc.jacrev, torch.func.jacrev, plain_rows])
EVERY_PLACE = pytest.mark.parametrize("made", [pullback_of, made_inside, under_no_grad])
BY_X_TOO = pytest.mark.parametrize("by_x_too", [False, True], ids=["constant", "tracked"])


@EVERY_DOOR
@EVERY_PLACE
@BY_X_TOO
@pytest.mark.parametrize("func", [linear, curved])
def test_first_derivative(func: Map, by_x_too: bool, made: Any, door: Any) -> None:
    pull = made(func, X.clone().requires_grad_(by_x_too))
    assert_same(door(pull)(U).detach(), rows(func, X).T)


@EVERY_DOOR
@pytest.mark.parametrize("func", [normed, determined, by_a_function])
def test_through_backward_passes_with_faults(func: Map, door: Any) -> None:
    assert_same(door(pullback_of(func, X))(U).detach(), rows(func, X).T)


@REVERSE
def test_the_other_uses_of_a_cotangent_count_beside_it(door: Any) -> None:
    pull = pullback_of(curved, X)
    found = door(lambda u: pull(u).sum().reshape(1) + u.sum())(U)
    assert_same(found, (rows(curved, X).sum(1) + 1).reshape(1, 3))


@pytest.mark.parametrize("outer", [jacfunc.jacrev, jacfunc.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("inner", [jacfunc.jacrev, jacfunc.jacfwd, torch.func.jacfwd])
@BY_X_TOO
def test_second_derivative(by_x_too: bool, inner: Any, outer: Any) -> None:
    pull = pullback_of(curved, X.clone().requires_grad_(by_x_too))
    jac = rows(curved, X)
    found = outer(inner(lambda u: pull(u**2) ** 3))(U).detach()
    want = torch.func.hessian(lambda u: (jac.T @ u**2) ** 3)(U)
    assert_same(found, want)


def test_by_the_cotangent_and_by_the_point() -> None:
    x, u = X.clone().requires_grad_(), U.clone().requires_grad_()
    product = pullback_of(curved, x)(u)
    by_ours = torch.autograd.grad(product.pow(3).sum(), (x, u))
    product = torch.autograd.grad(curved(x), x, u, create_graph=True)[0]
    for found, want in zip(by_ours, torch.autograd.grad(product.pow(3).sum(), (x, u)), strict=True):
        assert_same(found, want)


def test_training_by_the_cotangent_frees_nothing_of_the_pullback() -> None:
    pull, u = pullback_of(curved, X), U.clone().requires_grad_()
    for _ in range(2):
        pull(u).sum().backward()
    assert_same(u.grad, 2 * rows(curved, X).sum(1))


@pytest.mark.parametrize("func", [linear, curved, determined, lambda x: x[:3] + 1])
@BY_X_TOO
def test_nothing_requires_grad_under_no_grad(by_x_too: bool, func: Map) -> None:
    pull = pullback_of(func, X.clone().requires_grad_(by_x_too))
    with torch.no_grad():
        product = pull(U.clone().requires_grad_())
    assert not product.requires_grad
    assert_same(product, U @ rows(func, X))


@pytest.mark.parametrize("door", [jacfunc.jacrev, jacfunc.jacfwd, torch.func.jacrev])
def test_results_lead_to_nothing_inside_the_pullback(door: Any) -> None:
    assert not door(pullback_of(curved, X))(U).requires_grad


# --- with vmap ---

MANY = torch.linspace(-1, 1, 15, dtype=D).reshape(5, 3)
EVERY_VMAP = pytest.mark.parametrize("vmap", [jacfunc.vmap, torch.vmap], ids=["ours", "torch"])


def apart(x: Tensor) -> Tensor:
    """Whose backward pass has a wrong rule for vmap."""
    return torch.cdist(x.reshape(2, 2), A[:, :2]).sum(0)


@EVERY_VMAP
@BY_X_TOO
@pytest.mark.parametrize("func", [linear, curved, normed, determined, by_a_function, apart])
def test_vmap_over_cotangents(func: Map, by_x_too: bool, vmap: Any) -> None:
    pull, jac = pullback_of(func, X.clone().requires_grad_(by_x_too)), rows(func, X)
    assert_same(vmap(pull)(MANY).detach(), MANY @ jac)
    assert_same(vmap(pull, in_dims=1)(MANY.T).detach(), MANY @ jac)
    twice = vmap(vmap(pull))(MANY.expand(2, 5, 3)).detach()
    assert_same(twice, (MANY @ jac).expand(2, 5, 4))


@EVERY_VMAP
@pytest.mark.parametrize("grad", [jacfunc.jacrev, torch.func.grad])
@BY_X_TOO
def test_gradients_with_vmap(by_x_too: bool, grad: Any, vmap: Any) -> None:
    pull, jac = pullback_of(curved, X.clone().requires_grad_(by_x_too)), rows(curved, X)
    want = 3 * (MANY @ jac).square() @ jac.T
    assert_same(vmap(grad(lambda u: pull(u).pow(3).sum()))(MANY).detach(), want)
    assert_same(grad(lambda us: vmap(pull)(us).pow(3).sum())(MANY).detach(), want)


@EVERY_VMAP
@pytest.mark.parametrize("door", [jacfunc.jacrev, jacfunc.jacfwd, torch.func.jacrev])
def test_pullbacks_of_samples(door: Any, vmap: Any) -> None:
    points = torch.stack([X, 2 * X, -X])
    found = vmap(lambda x: door(pullback_of(curved, x))(U))(points)
    assert_same(found, torch.stack([rows(curved, x).T for x in points]))
    found = door(lambda u: vmap(lambda x: pullback_of(curved, x)(u))(points).sum(0))(U)
    assert_same(found, sum(rows(curved, x).T for x in points))


def test_a_penalty_on_rows_through_a_norm_is_right() -> None:
    """Torch takes the statistics for constants where rows are pulled back under vmap."""

    def penalty(x: Tensor, pull_rows: Any) -> Tensor:
        return pull_rows(x).pow(2).sum()

    def ours(x: Tensor) -> Tensor:
        return torch.vmap(pullback_of(normed, x))(torch.eye(3, dtype=D))

    def by_loop(x: Tensor) -> Tensor:
        outputs = normed(x)
        every = [torch.autograd.grad(y, x, create_graph=True)[0] for y in outputs]
        return torch.stack(every)

    x = X.clone().requires_grad_()
    want = torch.autograd.grad(penalty(x, by_loop), x)[0]
    assert_same(torch.autograd.grad(penalty(x, ours), x)[0], want)
    assert_same(torch.func.grad(lambda x: penalty(x, ours))(X), want)


def test_forward_mode_of_a_solve_under_vmap_is_refused() -> None:
    def solved(x: Tensor) -> Tensor:
        return torch.linalg.solve(torch.eye(3, dtype=D) + x[0] * A[:, :3], x[1:])

    points = torch.stack([X, 2 * X])
    want = torch.stack([rows(solved, x).T for x in points])
    assert_same(torch.vmap(lambda x: jacfunc.jacrev(pullback_of(solved, x))(U))(points), want)
    with pytest.raises(Refused, match=r"^vjp: .*forward mode through its backward pass is wrong"):
        torch.vmap(lambda x: jacfunc.jacfwd(pullback_of(solved, x))(U))(points)


# --- trees ---


def test_trees_and_leaves_without_a_path() -> None:
    def func(tree: dict[str, Tensor], y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return tree["w"] @ y, {"unused": torch.ones(2, dtype=D), "square": y**2}

    tree = {"w": A, "idle": torch.zeros(3, dtype=D)}
    _, pull = jacfunc.vjp(func, tree, X)

    def scalar(u: Tensor, v: Tensor) -> Tensor:
        of_tree, of_y = pull((u, {"unused": u[:2], "square": v}))
        return (of_tree["w"] ** 2).sum() + of_tree["idle"].sum() + (of_y**3).sum()

    def by_hand(u: Tensor, v: Tensor) -> Tensor:
        return (torch.outer(u, X) ** 2).sum() + ((A.T @ u + 2 * X * v) ** 3).sum()

    v = torch.arange(4.0, dtype=D)
    want = torch.autograd.functional.jacobian(by_hand, (U, v))
    assert_same(jacfunc.jacrev(scalar, argnums=(0, 1))(U, v), want)
    assert_same(jacfunc.jacfwd(scalar, argnums=(0, 1))(U, v), want)
    assert_same(torch.func.grad(scalar, argnums=(0, 1))(U, v), want)


@EVERY_DOOR
def test_outputs_that_no_path_leads_to(door: Any) -> None:
    pull = pullback_of(lambda x: torch.ones(3, dtype=D) + x.detach()[:3], X)
    assert_same(door(lambda u: pull(u) + u.sum())(U), torch.ones(4, 3, dtype=D))


# --- what is refused ---


def detached(x: Tensor) -> Tensor:
    h = A @ x.sin()
    if h.requires_grad:
        h.register_hook(lambda cotangent: 3 * cotangent.detach())
    return h


NOT_DIFFERENTIABLE = {
    "once": (lambda x: A @ OnceDifferentiable.apply(x), "once_differentiable"),
    "hook": (detached, "detaches its cotangent"),
    "formula": (lambda x: torch._weight_norm_interface(A @ x, x[:1])[0], "its formula is wrong"),
    "cdist": (apart, "not implemented"),
}


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_backward_passes_that_are_not_differentiable(name: str) -> None:
    func, reason = NOT_DIFFERENTIABLE[name]
    size = len(func(X))
    _, pull = jacfunc.vjp(func, X)
    u = torch.linspace(1, 2, size, dtype=D)
    for door in (jacfunc.jacrev, torch.func.jacrev):
        with pytest.raises(Refused, match=f"^(vjp|jacrev): .*{reason}"):
            door(lambda u: pull(u)[0])(u)
    # forward mode needs no second derivative
    eye = torch.eye(size, dtype=D)
    want = torch.stack([pull(e)[0] for e in eye], 1)
    assert_same(jacfunc.jacfwd(lambda u: pull(u)[0])(u), want)


# --- the matrix of a loss is a map of its vector, too ---


@pytest.fixture
def matrix() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False).double()
    inputs, targets = torch.randn(3, 2, dtype=D), torch.randn(3, 2, dtype=D)
    made = jacfunc.ggn(model, nn.MSELoss(reduction="sum"))(inputs, targets)
    return made, 2 * torch.kron(torch.eye(2, dtype=D), inputs.T @ inputs)


@pytest.mark.parametrize("door", [jacfunc.jacrev, torch.func.jacrev, jacfunc.vmap, torch.vmap])
def test_products_of_the_loss_matrix(door: Any, matrix: tuple[Any, Tensor]) -> None:
    made, dense = matrix

    def product(v: Tensor) -> Tensor:
        return (made @ {"weight": v.reshape(2, 2)})["weight"].flatten()

    for _ in range(3):  # each product may take another way
        at = torch.eye(4, dtype=D) if door in (jacfunc.vmap, torch.vmap) else torch.ones(4, dtype=D)
        assert_same(door(product)(at), dense)


def test_products_of_the_loss_matrix_refuse_forward_mode(matrix: tuple[Any, Tensor]) -> None:
    vector = {"weight": torch.ones(2, 2, dtype=D)}
    with pytest.raises(Refused, match=r"^ggn: products must be differentiated in reverse mode"):
        torch.func.jvp(lambda v: (matrix[0] @ v)["weight"], (vector,), (vector,))


class Adding(nn.Module):
    """Its Jacobians in the inputs and in the parameter are the cotangents themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


@pytest.mark.parametrize("strategy", ["auto", "reverse", "structured"])
@pytest.mark.parametrize("wrt", ["inputs", "params"])
def test_results_are_no_seeds_that_are_kept(wrt: Any, strategy: str) -> None:
    jac = jacfunc.module_jacobian(Adding(), wrt, per_sample=True, strategy=strategy)
    results = [jac(torch.ones(4, 3)) for _ in range(5)]
    blocks = [result["bias"] if wrt == "params" else result for result in results]
    assert len({block.untyped_storage().data_ptr() for block in blocks}) == len(blocks)
    for block in blocks:
        assert torch.equal(block, torch.eye(3).expand(4, 3, 3))
        block.zero_()
