"""Second derivatives: orders of modes, rows, products, and what they keep and evaluate."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F

import jacfunc
from jacfunc._torch import inside_transform
from jacfunc.strategies import ReverseOverForward
from tests.kinds.problems import PROBLEMS
from tests.truth.oracles import assert_same, float_leaves, looped_hessian, picked, tree_map
from tests.truth.reference import reference_hessian

ORDERS = ("reverse-over-reverse", "forward-over-reverse", "reverse-over-forward")
SMOOTH = [problem for problem in PROBLEMS if "smooth" in problem.stress]
A = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ATOMS = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def energy(positions: Tensor) -> Tensor:
    """Of atoms that repel each other."""
    pairs = torch.combinations(torch.arange(len(positions)))
    return (positions[pairs[:, 0]] - positions[pairs[:, 1]]).square().sum(-1).rsqrt().sum()


def central(func: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, step: float = 1e-5) -> Tensor:
    """H v by differences of gradients."""

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(func(x), x)[0]

    return (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)


# --- orders of modes ---


UNPUSHED = {"solve", "det", "batched_det", "slogdet", "cholesky_inverse"}
"""Problems whose forward mode torch gets wrong under vmap."""


@pytest.mark.parametrize("problem", SMOOTH, ids=lambda problem: problem.name)
def test_reverse_over_forward_on_every_problem(problem: Any, device: str) -> None:
    args = problem.make_args(device, torch.float64)
    derive = jacfunc.hessian(problem.func, problem.argnums, strategy="reverse-over-forward")
    if problem.name in UNPUSHED:
        with pytest.raises(NotImplementedError):
            derive(*args, **problem.kwargs)
        return
    result = derive(*args, **problem.kwargs)
    assert_same(result, reference_hessian(problem.name, device), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("strategy", [*ORDERS, "looped-over-reverse", ReverseOverForward(2)])
def test_orders_agree_with_differences(strategy: Any) -> None:
    hess = jacfunc.hessian(energy, strategy=strategy)(ATOMS)
    units = torch.eye(18, dtype=torch.float64).view(18, 6, 3)
    rows = torch.stack([central(energy, ATOMS, unit) for unit in units])
    torch.testing.assert_close(hess.view(18, 6, 3), rows, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("strategy", [*ORDERS, "auto"])
def test_functions_of_many_numbers(strategy: str) -> None:
    def func(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": torch.tanh(A @ x["u"]) * x["v"].prod(), "b": x["v"].exp().sum()}

    point = {"u": A[0].clone(), "v": A[1, :2].clone(), "n": torch.arange(2)}
    result = jacfunc.hessian(func, strategy=strategy)(point)
    assert_same(result, looped_hessian(func, (point,)), rtol=1e-9, atol=1e-9)


class Squared(torch.autograd.Function):
    """x², of which torch must not differentiate the backward pass; its tangents it may."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


def test_auto_goes_on_where_torch_has_no_second_backward_pass() -> None:
    x = A[0].clone()
    expected = torch.diag(6 * x)
    with pytest.raises(NotImplementedError, match="once_differentiable"):
        jacfunc.hessian(lambda x: (Squared.apply(x) * x).sum(), strategy=ORDERS[0])(x)
    actual = jacfunc.hessian(lambda x: (Squared.apply(x) * x).sum())(x)
    torch.testing.assert_close(actual, expected)
    _, (product,) = jacfunc.hvp(lambda x: (Squared.apply(x) * x).sum(), (x,), (x,))
    torch.testing.assert_close(product, 6 * x**2)


def norm_net(weights: Tensor) -> Tensor:
    return torch.tanh(F.layer_norm(weights @ A, (4,))).square().sum()


def det(matrix: Tensor) -> Tensor:
    return torch.linalg.det(matrix).sin()


@pytest.mark.parametrize("strategy", [*ORDERS, "auto"])
@pytest.mark.parametrize("func", [norm_net, det], ids=["layer_norm", "det"])
def test_where_torch_is_wrong_every_order_is_right_or_refuses(func: Any, strategy: str) -> None:
    x = torch.randn(5, 5, dtype=torch.float64)
    try:
        actual = jacfunc.hessian(func, strategy=strategy)(x)
    except NotImplementedError:
        assert strategy not in ("auto", ORDERS[0])
        return
    torch.testing.assert_close(actual, looped_hessian(func, (x,)), rtol=1e-8, atol=1e-9)


def test_reverse_over_forward_takes_hessians_alone() -> None:
    with pytest.raises(NotImplementedError, match=r"^jacobian: .*second derivatives alone"):
        jacfunc.jacobian(torch.sin, strategy=ReverseOverForward())(torch.ones(2))


@pytest.mark.parametrize("strategy", [*ORDERS, "auto"])
def test_dropout_has_one_mask(strategy: str) -> None:
    x = torch.ones(8, dtype=torch.float64)
    func = lambda x: F.dropout(x, 0.5).pow(3).sum()  # noqa: E731
    diagonal = jacfunc.hessian(func, strategy=strategy)(x).diagonal()
    assert set(diagonal.tolist()) <= {0.0, 48.0}


# --- rows ---


@pytest.mark.parametrize("strategy", [*ORDERS, "auto"])
@pytest.mark.parametrize(
    "rows",
    [[0, 4], slice(1, None, 2), torch.tensor([5, -6, 5]), torch.arange(6) > 3, range(2), []],
    ids=["list", "slice", "tensor", "mask", "range", "none"],
)
def test_rows_are_those_of_the_whole(rows: Any, strategy: str) -> None:
    whole = looped_hessian(energy, (ATOMS,))
    index = list(rows) if isinstance(rows, range) else rows
    actual = jacfunc.hessian(energy, rows=rows, strategy=strategy)(ATOMS)
    torch.testing.assert_close(actual, whole[index].reshape(actual.shape))
    assert actual.shape[1:] == (3, 6, 3)


def test_rows_of_functions_of_many_numbers() -> None:
    func = lambda x: torch.tanh(A @ x)  # noqa: E731
    x = A[0].clone()
    for strategy in ORDERS:
        actual = jacfunc.hessian(func, rows=[2], strategy=strategy)(x)
        torch.testing.assert_close(actual, looped_hessian(func, (x,))[:, [2]])


def test_no_other_row_is_swept() -> None:
    swept = []

    class Watched(torch.autograd.Function):
        """The identity, that notes how many cotangents come back to it."""

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return Back.apply(cotangent)

    class Back(Watched):
        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            swept.append(1)
            return cotangent.clone()

    jacfunc.hessian(lambda x: energy(Watched.apply(x)), rows=[1, 3], strategy="looped")(ATOMS)
    assert len(swept) == 2 * 3
    swept.clear()
    jacfunc.hessian(lambda x: energy(Watched.apply(x)), strategy="looped")(ATOMS)
    assert len(swept) == 6 * 3


def test_rows_are_written_into_those_of_an_earlier_call() -> None:
    derive = jacfunc.hessian(energy, rows=[1, 3])
    first = derive(ATOMS)
    again = jacfunc.hessian(energy, rows=[0, 2], out=first)(ATOMS)
    assert again is first
    torch.testing.assert_close(first, looped_hessian(energy, (ATOMS,))[[0, 2]])


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        (3, TypeError, r"^hessian: rows must be a slice, .* got int\. Write \[3\]"),
        ("3", TypeError, r"^hessian: rows must be a slice, .* got str"),
        ([9], ValueError, r"^hessian: rows must lie among the 6 of the tensor, got \[9\]"),
        (torch.ones(2), ValueError, r"^hessian: rows must lie among the 6 of the tensor"),
    ],
)
def test_bad_rows(rows: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        jacfunc.hessian(energy, rows=rows)(ATOMS)


def test_rows_are_those_of_one_tensor() -> None:
    with pytest.raises(ValueError, match=r"^hessian: rows must be those of one tensor"):
        jacfunc.hessian(lambda x, y: (x * y).sum(), (0, 1), rows=[0])(A[0], A[1])


# --- products ---


@pytest.mark.parametrize("problem", SMOOTH, ids=lambda problem: problem.name)
def test_hvp_on_every_problem(problem: Any, device: str) -> None:
    """Of the sum of a problem's outputs, beside its Hessian by loops."""
    args = problem.make_args(device, torch.float64)
    chosen = picked(args, problem.argnums)
    if isinstance(problem.argnums, tuple) or problem.argnums != 0:
        return

    def total(x: Any) -> Tensor:
        out = problem.func(x, *args[1:], **problem.kwargs)
        return sum(leaf.double().sum() for leaf in float_leaves(out))

    tangents = tree_map(
        lambda x: torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() else None,
        chosen,
    )
    _, (result,) = jacfunc.hvp(total, (chosen,), (tangents,))
    blocks = float_leaves(looped_hessian(total, (chosen,)))
    leaves, seeds = float_leaves(chosen), float_leaves(tangents)
    count = len(leaves)
    for number, got in enumerate(float_leaves(result)):
        row = blocks[number * count : (number + 1) * count]
        pairs = zip(row, seeds, strict=True)
        want = sum((block.flatten(got.dim()) * seed.flatten()).sum(-1) for block, seed in pairs)
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-6, atol=1e-6)


def test_hvp_agrees_with_differences() -> None:
    v = torch.randn_like(ATOMS)
    value, (product,) = jacfunc.hvp(energy, (ATOMS,), (v,))
    assert_same(value, energy(ATOMS))
    torch.testing.assert_close(product, central(energy, ATOMS, v), rtol=1e-6, atol=1e-8)


def test_hvp_of_trees_and_aux() -> None:
    def func(x: dict[str, Tensor], y: Tensor) -> tuple[Tensor, str]:
        return (x["a"] ** 2 * y).sum(), "any object"

    x, y = {"a": A[0].clone(), "n": torch.arange(3)}, A[1].clone()
    vector = {"n": None, "a": torch.ones_like(x["a"])}
    value, (in_x, in_y), aux = jacfunc.hvp(
        func, (x, y), (vector, torch.zeros_like(y)), has_aux=True
    )
    assert aux == "any object"
    assert_same(value, func(x, y)[0])
    assert in_x["n"] is None
    torch.testing.assert_close(in_x["a"], 2 * y)
    torch.testing.assert_close(in_y, 2 * x["a"])


def test_hvp_of_one_number_in_a_container() -> None:
    value, (product,) = jacfunc.hvp(lambda x: {"loss": x.pow(3).sum()[None]}, (A[0],), (A[1],))
    assert value["loss"].shape == (1,)
    torch.testing.assert_close(product, 6 * A[0] * A[1])


@pytest.mark.parametrize("transform", [torch.func.vmap, jacfunc.vmap])
def test_hvp_in_vmap(transform: Any) -> None:
    actual = transform(lambda x, v: jacfunc.hvp(lambda x: x.pow(3).sum(), (x,), (v,))[1][0])(A, A)
    torch.testing.assert_close(actual, 6 * A**2)


def test_hvp_is_differentiable_by_point_and_vector() -> None:
    x, v = A[0].clone().requires_grad_(), A[1].clone().requires_grad_()
    _, (product,) = jacfunc.hvp(lambda x: x.pow(4).sum(), (x,), (v,))
    by_x, by_v = torch.autograd.grad(product.sum(), (x, v))
    torch.testing.assert_close(by_x, 24 * x * v)
    torch.testing.assert_close(by_v, 12 * x**2)
    third = jacfunc.jacrev(lambda x: jacfunc.hvp(lambda x: x.pow(4).sum(), (x,), (v,))[1][0])(x)
    torch.testing.assert_close(third, torch.diag(24 * x * v))


def test_a_compiler_traces_products_in_one_graph() -> None:
    def product(x: Tensor, v: Tensor) -> Tensor:
        return jacfunc.hvp(lambda x: x.pow(3).sum(), (x,), (v,))[1][0]

    compiled = torch.compile(product, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(A[0], A[1]), 6 * A[0] * A[1])


def test_hvp_where_norms_keep_statistics() -> None:
    x = torch.randn(5, 5, dtype=torch.float64)
    v = torch.randn_like(x)
    _, (product,) = jacfunc.hvp(norm_net, (x,), (v,))
    torch.testing.assert_close(product, central(norm_net, x, v), rtol=1e-5, atol=1e-7)
    third = torch.autograd.functional.jacobian(
        lambda x: (looped_hessian_times(norm_net, x, v) * v).sum(), x
    )
    ours = jacfunc.jacrev(lambda x: (jacfunc.hvp(norm_net, (x,), (v,))[1][0] * v).sum())(x)
    steps = [1e-4 * v, -1e-4 * v]
    up, down = ((jacfunc.hvp(norm_net, (x + step,), (v,))[1][0] * v).sum() for step in steps)
    torch.testing.assert_close((ours * v).sum(), (up - down) / 2e-4, rtol=1e-4, atol=1e-6)
    assert third.shape == ours.shape


def looped_hessian_times(func: Any, x: Tensor, v: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(func(x), x, create_graph=True)
    return torch.autograd.grad(first, x, v, create_graph=True)[0]


@pytest.mark.parametrize(
    ("pulled", "pushed", "modes"),
    [(0.01, 0.002, "rrrppppp"), (0.01, 0.02, "rrrpprrr"), (0.001, 0.0001, "rrrrrrrr")],
    ids=["faster", "slower", "not worth a try"],
)
def test_hvp_measures_the_orders(
    pulled: float, pushed: float, modes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of the processor are counted by the function itself, by how it is evaluated."""
    now, seen = [0.0], []

    def func(x: Tensor) -> Tensor:
        seen.append("p" if inside_transform() else "r")
        now[0] += pushed if inside_transform() else pulled
        return x.pow(3).sum()

    monkeypatch.setattr(time, "process_time", lambda: now[0])
    for _ in range(7 if pulled > 0.005 else 8):
        _, (product,) = jacfunc.hvp(func, (A[0],), (A[1],))
        torch.testing.assert_close(product, 6 * A[0] * A[1])
    assert "".join(seen) == modes


def test_hvp_stays_with_the_order_that_torch_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def func(x: Tensor) -> Tensor:
        now[0] += 1.0
        x.detach().numpy()  # no transform can
        return x.pow(3).sum()

    monkeypatch.setattr(time, "process_time", lambda: now[0])
    for _ in range(7):
        _, (product,) = jacfunc.hvp(func, (A[0],), (A[1],))
        torch.testing.assert_close(product, 6 * A[0] * A[1])


@pytest.mark.parametrize(
    ("func", "tangents", "error", "match"),
    [
        (torch.sin, (A[0],), ValueError, r"^hvp: func must return one number, got tensors of"),
        (torch.sum, (A[0, :2],), ValueError, r"^hvp: tangents must match in shape"),
        (torch.sum, (A[0].float(),), TypeError, r"^hvp: tangents must match in dtype"),
    ],
)
def test_bad_products(func: Any, tangents: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        jacfunc.hvp(func, (A[0],), tangents)


# --- what is evaluated, and what is kept ---


@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped"])
def test_hessians_evaluate_once(strategy: str) -> None:
    calls = []

    def func(x: Tensor) -> Tensor:
        calls.append(inside_transform())
        return x.pow(3).sum()

    jacfunc.hessian(func, strategy=strategy)(A[0])
    calls.clear()
    jacfunc.hessian(func, strategy=strategy)(A[0])
    jacfunc.hvp(func, (A[0],), (A[1],))
    assert len(calls) == 2


def mlp_loss() -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    params = {name: param.detach() for name, param in model.named_parameters()}
    targets = torch.tensor([0, 1, 2, 0, 1])
    return lambda params: F.cross_entropy(functional_call(model, params, (A,)), targets), params


def saved_in(run: Callable[[], Any]) -> int:
    """How many tensors graphs have saved while something ran."""
    saved = [0]

    def pack(tensor: Tensor) -> Tensor:
        saved[0] += 1
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return saved[0]


def by_hand(func: Any, params: dict[str, Tensor], product: bool) -> None:
    leaves = {name: param.requires_grad_() for name, param in params.items()}
    grads = torch.autograd.grad(func(leaves), list(leaves.values()), create_graph=True)
    for grad in grads:
        seeds = grad.new_ones(1 if product else 2, *grad.shape)
        for seed in seeds:
            torch.autograd.grad(grad, list(leaves.values()), seed, True, allow_unused=True)


@pytest.mark.parametrize("what", ["hvp", "reverse-over-reverse", "looped-over-reverse", "auto"])
def test_no_third_order_graph_is_kept(what: str) -> None:
    """The second sweep saves nothing: all that is saved belongs to function and gradient."""
    func, params = mlp_loss()
    vector = {name: torch.ones_like(param) for name, param in params.items()}

    def run() -> Any:
        if what == "hvp":
            return jacfunc.hvp(func, (params,), (vector,))
        return jacfunc.hessian(func, strategy=what)(params)

    run()  # plans are made once
    kept = saved_in(run)
    owned = {name: param.clone() for name, param in params.items()}
    assert kept <= saved_in(lambda: by_hand(func, owned, product=True))
    result = run()
    assert not any(leaf.requires_grad for leaf in float_leaves(result))


def test_parameters_that_train_keep_no_third_order_graph_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    frozen = copy.deepcopy(model).requires_grad_(False)

    def saved_by(net: nn.Module, strategy: str) -> int:
        derive = jacfunc.hessian(lambda x: net(x).square().sum(), strategy=strategy)
        return saved_in(lambda: derive(A[0]))

    for strategy in ("looped", "reverse"):
        with_graph = saved_by(model, strategy)
        with torch.no_grad():
            without = saved_by(model, strategy)
        assert without < with_graph
        # what the two sweeps save is for the function and its gradient alone
        assert without <= saved_by(frozen, strategy) + 2 * len(list(model.parameters()))


def test_a_second_sweep_keeps_no_more_for_more_rows() -> None:
    def func(x: Tensor) -> Tensor:
        return torch.tanh(A @ x).square().sum()

    derive = {n: jacfunc.hessian(func, rows=range(n), strategy="looped") for n in (1, 4)}
    kept = {n: saved_in(lambda n=n: derive[n](A[0])) for n in derive}
    assert kept[1] == kept[4]


def test_who_differentiates_on_has_the_graph() -> None:
    x = A[0].clone().requires_grad_()
    hess = jacfunc.hessian(lambda x: x.pow(4).sum())(x)
    (third,) = torch.autograd.grad(hess.sum(), x)
    torch.testing.assert_close(third, 24 * x)


# --- operations with a batching rule of the user's ---

BATCHED: list[tuple[int, ...]] = []


@torch.library.custom_op("jacfunc_second::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("jacfunc_second::cube_back", mutates_args=())
def cube_back(x: Tensor, cotangent: Tensor) -> Tensor:
    return 3 * x**2 * cotangent


def batched_cube(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
    BATCHED.append(tuple(x.shape))
    return cube(x), in_dims[0]


def batched_back(info: Any, in_dims: Any, x: Tensor, cotangent: Tensor) -> tuple[Tensor, int]:
    BATCHED.append(tuple(cotangent.shape))
    pairs = zip((x, cotangent), in_dims, strict=True)
    x, cotangent = (t[None] if d is None else t.movedim(d, 0) for t, d in pairs)
    x, cotangent = torch.broadcast_tensors(x, cotangent)
    return cube_back(x.contiguous(), cotangent.contiguous()), 0


cube.register_autograd(
    lambda ctx, cotangent: cube_back(ctx.saved_tensors[0], cotangent),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
cube_back.register_autograd(
    lambda ctx, cotangent: (
        6 * ctx.saved_tensors[0] * ctx.saved_tensors[1] * cotangent,
        cube_back(ctx.saved_tensors[0], cotangent),
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
cube.register_vmap(batched_cube)
cube_back.register_vmap(batched_back)


def test_registered_batching_rules_run() -> None:
    x = A[0].clone()
    BATCHED.clear()
    torch.testing.assert_close(jacfunc.jacrev(cube)(x), torch.diag(3 * x**2))
    assert BATCHED == [(4, 4)]  # all rows in one call of the backward's own batched form
    BATCHED.clear()
    hess = jacfunc.hessian(lambda x: cube(x).sum(), strategy="reverse")(x)
    torch.testing.assert_close(hess, torch.diag(6 * x))
    assert BATCHED == [(4, 4)]
    BATCHED.clear()
    torch.testing.assert_close(
        torch.stack([*jacfunc.vmap(jacfunc.jacrev(cube))(A)]).sum(1), 3 * A**2
    )
    assert (5, 4) in BATCHED
