"""``laplacian``, ``value_jacobian_laplacian`` and ``hessian_diagonal``: right, and by which way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import jacfunc
from jacfunc._memory import PeakBytes
from tests.truth.oracles import looped_hessian

Log = pytest.LogCaptureFixture
X = torch.tensor([0.7, -0.5, 1.3], dtype=torch.float64)


def looped(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Laplacian of one number by ``torch.autograd.grad``, an input after the other."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(func(x), x, create_graph=True)
    grad = torch.autograd.grad
    parts = [grad(entry, x, create_graph=True)[0].flatten()[k] for k, entry in enumerate(first)]
    return torch.stack(parts).sum()


def net(*widths: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def swept(log: Log) -> list[str]:
    return [message for message in log.messages if "swept" in message]


# --- closed forms ---


def test_a_power_of_the_radius() -> None:
    """``Δ rᵖ = p (p + d - 2) rᵖ⁻²``."""
    laplacian = jacfunc.laplacian(lambda x: x.norm() ** 3)(X)
    torch.testing.assert_close(laplacian, 3 * (3 + 3 - 2) * X.norm())


def test_the_potential_of_a_point_is_harmonic() -> None:
    assert abs(jacfunc.laplacian(lambda x: 1 / x.norm())(X)) < 1e-14


def test_waves_are_eigenfunctions() -> None:
    k = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    laplacian = jacfunc.laplacian(lambda x: torch.sin(k @ x))(X)
    torch.testing.assert_close(laplacian, -k.square().sum(1) * torch.sin(k @ X))


def test_a_logarithm_of_a_determinant() -> None:
    """``∂² log |det A| / ∂ A[i, j]² = -(A⁻¹[j, i])²``."""
    A = torch.eye(3, dtype=torch.float64) * 2 + torch.outer(X, X)
    expected = -torch.linalg.inv(A).T.square()
    diagonal = jacfunc.hessian_diagonal(lambda A: torch.linalg.slogdet(A)[1])(A)
    torch.testing.assert_close(diagonal, expected)
    torch.testing.assert_close(jacfunc.laplacian(torch.logdet)(A), expected.sum())


def test_the_local_energy_of_a_gaussian_in_a_harmonic_trap() -> None:
    """Its energy ``-½ (Δ log ψ + |∇ log ψ|²) + ½ r²`` is ``d / 2`` wherever it is taken."""
    parts = jacfunc.value_jacobian_laplacian(lambda x: -x.square().sum() / 2)
    _, gradient, laplacian = jacfunc.vmap(parts)(torch.randn(4, 3, dtype=torch.float64).add(X))
    points = -gradient
    energy = -(laplacian + gradient.square().sum(-1)) / 2 + points.square().sum(-1) / 2
    torch.testing.assert_close(energy, torch.full((4,), 1.5, dtype=torch.float64))


# --- trees, arguments, options ---


def test_outputs_may_be_a_tree_and_arguments_several() -> None:
    def func(x: Tensor, scale: dict[str, Tensor], *, shift: float) -> dict[str, Any]:
        y = (x * scale["a"]).square()
        return {"sum": y.sum() + shift, "pair": (y, x), "label": torch.tensor(3)}

    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    one = jacfunc.laplacian(func)(X, {"a": a}, shift=1.0)
    torch.testing.assert_close(one["sum"], 2 * a.square().sum())
    torch.testing.assert_close(one["pair"][0], 2 * a.square())
    assert one["pair"][1].tolist() == [0, 0, 0]
    assert one["label"] is None
    both = jacfunc.laplacian(func, (0, -1))(X, {"a": a}, shift=1.0)
    torch.testing.assert_close(both["sum"], 2 * (a.square() + X.square()).sum())
    diagonals = jacfunc.hessian_diagonal(func, argnums=(0, 1))(X, {"a": a}, shift=1.0)["sum"]
    torch.testing.assert_close(diagonals[0], 2 * a.square())
    torch.testing.assert_close(diagonals[1]["a"], 2 * X.square())


def test_inputs_of_any_shape() -> None:
    A = torch.randn(2, 3, dtype=torch.float64)
    diagonal = jacfunc.hessian_diagonal(lambda A: A.T @ A.sin())(A)
    assert diagonal.shape == (3, 3, 2, 3)
    torch.testing.assert_close(jacfunc.laplacian(torch.sin)(X[0]), -X[0].sin())
    assert jacfunc.laplacian(lambda x: x.sum())(torch.zeros(0)) == 0
    assert jacfunc.laplacian(lambda x: x[:0])(torch.zeros(2)).shape == (0,)


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_directions_may_come_in_chunks(chunk_size: int) -> None:
    model = net(3, 5, 2)
    for door in (jacfunc.laplacian, jacfunc.hessian_diagonal, jacfunc.value_jacobian_laplacian):
        torch.testing.assert_close(door(model, chunk_size=chunk_size)(X), door(model)(X))


def test_aux_is_handed_back() -> None:
    func = lambda x: (x.square().sum(), {"x": x, "word": "any", "n": torch.tensor(3)})  # noqa: E731
    for door in (jacfunc.laplacian, jacfunc.hessian_diagonal):
        result, aux = door(func, has_aux=True)(X)
        assert aux["word"] == "any"
        assert aux["x"].equal(X)
        assert type(aux["x"]) is Tensor
        assert result.sum() == 6
    (value, aux), jacobian, laplacian = jacfunc.value_jacobian_laplacian(func, has_aux=True)(X)
    assert (value, laplacian) == (X.square().sum(), 6)
    assert jacobian.equal(2 * X)
    assert aux["n"] == 3


def test_dtypes_are_those_of_a_jacobian() -> None:
    single = jacfunc.laplacian(lambda x: x.square())(X.float())
    assert single.dtype == torch.float32
    diagonal = jacfunc.hessian_diagonal(lambda x: x.double().square().sum())(X.float())
    assert diagonal.dtype == torch.float64


# --- further derivatives, batches ---


def test_a_loss_trains_through_it() -> None:
    """The gradient by parameters of a residual, as a PINN has it, equals that of the loop."""
    model = net(3, 6, 6, 1)
    points = torch.randn(4, 3, dtype=torch.float64)
    residual = jacfunc.vmap(jacfunc.laplacian(lambda x: model(x)[0]))(points) + points.sum(1)
    residual.square().mean().backward()
    expected = torch.stack([looped(lambda x: model(x)[0], point) for point in points])
    loss = (expected + points.sum(1)).square().mean()
    for param, grad in zip(
        model.parameters(),
        torch.autograd.grad(loss, [*model.parameters()], allow_unused=True),
        strict=True,
    ):
        if grad is not None:
            torch.testing.assert_close(param.grad, grad)


def test_transforms_go_through_it_by_functional_arguments() -> None:
    model = net(3, 5, 1)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def residual(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return jacfunc.laplacian(lambda x: functional_call(model, params, (x,))[0])(x)

    def expected(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.hessian(lambda x: functional_call(model, params, (x,))[0])(x).trace()

    grads = torch.func.grad(residual)(params, X)
    for name, grad in torch.func.grad(expected)(params, X).items():
        torch.testing.assert_close(grads[name], grad)
    pushed = torch.func.jvp(lambda x: residual(params, x), (X,), (X,))[1]
    torch.testing.assert_close(pushed, torch.func.jvp(lambda x: expected(params, x), (X,), (X,))[1])
    by_us = jacfunc.jacrev(residual)(params, X)
    torch.testing.assert_close(by_us["0.weight"], grads["0.weight"])


def test_it_nests_in_itself() -> None:
    """``Δ Δ Σ x⁶ = 360 Σ x²``."""
    biharmonic = jacfunc.laplacian(jacfunc.laplacian(lambda x: (x**6).sum()))
    torch.testing.assert_close(biharmonic(X), 360 * X.square().sum())


def test_a_batch_of_points_and_of_parameters() -> None:
    weights = torch.randn(2, 3, dtype=torch.float64)
    points = torch.randn(4, 3, dtype=torch.float64)
    laplacian = jacfunc.laplacian(lambda x, w: torch.tanh(w @ x))
    batch = jacfunc.vmap(jacfunc.vmap(laplacian, in_dims=(0, None)), in_dims=(None, 0))
    expected = [[looped(lambda x, w=w: torch.tanh(w @ x), x) for x in points] for w in weights]
    torch.testing.assert_close(batch(points, weights), torch.stack([*map(torch.stack, expected)]))


def test_without_gradients_nothing_keeps_a_graph() -> None:
    model = net(3, 5, 1)
    with torch.no_grad():
        results = jacfunc.value_jacobian_laplacian(model)(X)
    assert not any(result.requires_grad for result in results)
    with_graph = jacfunc.value_jacobian_laplacian(model)(X)
    assert all(result.requires_grad for result in with_graph)


# --- by which way, and at what cost ---


class Counting(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x).sum()


def test_the_function_is_evaluated_once() -> None:
    model = Counting()
    jacfunc.laplacian(model)(X)
    assert model.calls == 1
    jacfunc.vmap(jacfunc.laplacian(model))(X.expand(4, 3))
    assert model.calls == 2


def test_no_hessian_is_made() -> None:
    """Its memory grows as the number of inputs, not as its square."""
    peaks = []
    for size in (100, 400):
        x = torch.randn(size)
        with PeakBytes() as counter:
            jacfunc.laplacian(lambda x: (x.sin().sum().exp() + x[0]) * torch.ones(2000))(x)
        peaks.append(counter.peak)
    assert peaks[1] < 6 * peaks[0]


UNRULY: dict[str, Callable[[Tensor], Tensor]] = {
    "scatter of a number": lambda x: (x**3).scatter(0, torch.tensor([1]), 5.0) * x,
    "filled by an input": lambda x: torch.full_like(x, 2.0).index_fill(0, torch.tensor([0]), 1) * x,
    "cumprod": lambda x: x.exp().cumprod(0) * x,
    "in place": lambda x: x.sin().mul_(x).add_(1),
    "written into": lambda x: torch.zeros(3, dtype=x.dtype).index_put_(
        (torch.tensor(1),), x[0] ** 3
    ),
    "det": lambda x: torch.linalg.det(torch.outer(x, x.sin()) + torch.diag(x)),
    "a derivative inside": lambda x: torch.func.grad(lambda y: (y**3).sum())(x) * x,
    "a graph inside": lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0] * x,
    "vmap inside": lambda x: torch.vmap(lambda y: y.sin() * y)(x),
    "a vectorized Jacobian inside": lambda x: jacfunc.jacrev(lambda y: y**3)(x) @ x,
    "gru": lambda x: nn.GRU(3, 2, dtype=x.dtype)(x.view(1, 1, 3))[0],
}


@pytest.mark.parametrize("name", UNRULY)
def test_what_has_no_rule_is_swept_and_the_log_says_so(name: str, caplog: Log) -> None:
    def func(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return UNRULY[name](x)

    hessian = looped_hessian(func, (X,))
    expected = hessian.diagonal(dim1=-2, dim2=-1)
    with caplog.at_level("INFO", "jacfunc"):
        torch.testing.assert_close(jacfunc.laplacian(func)(X), expected.sum(-1))
    assert len(swept(caplog)) == 1
    torch.testing.assert_close(jacfunc.hessian_diagonal(func)(X), expected)
    value, jacobian, laplacian = jacfunc.value_jacobian_laplacian(func)(X)
    torch.testing.assert_close(value, func(X.clone().requires_grad_()))
    torch.testing.assert_close(jacobian, jacfunc.jacrev(func)(X))
    torch.testing.assert_close(laplacian, expected.sum(-1))


def test_a_constant_that_is_written_into_later_is_refused_as_autograd_does(caplog: Log) -> None:
    W = torch.randn(4, 3, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        weight = W.clone()
        y = F.linear(x, weight)
        weight.mul_(2)
        return y.sin().sum()

    refused = pytest.raises(NotImplementedError, match="modified by an inplace operation")
    with caplog.at_level("INFO", "jacfunc"), refused:
        jacfunc.laplacian(func)(X)
    assert "writes into what an operation has read" in swept(caplog)[0]


def test_what_zeros_times_infinities_made_nan_is_swept(caplog: Log) -> None:
    x = torch.tensor([0.0, 4.0], dtype=torch.float64)
    with caplog.at_level("INFO", "jacfunc"):
        diagonal = jacfunc.hessian_diagonal(lambda x: x.sqrt().sum())(x)
    assert "nan" in swept(caplog)[0]
    assert diagonal.tolist() == [-torch.inf, -1 / 32]


def test_a_particle_has_the_distance_zero_to_itself_wherever_it_is() -> None:
    """``Δ |r₁ - r₂| = 4 / r`` in three dimensions, counted twice in a matrix of distances."""
    points = torch.randn(2, 3, dtype=torch.float64)
    laplacian = jacfunc.laplacian(lambda r: torch.cdist(r, r).sum())(points)
    torch.testing.assert_close(laplacian, 8 / (points[0] - points[1]).norm())


def test_its_peak_is_a_share_of_that_of_hessians() -> None:
    """Counted: at most 0.41 of the trace of ``vmap(hessian)``, however the function is written."""
    model = net(30, 96, 96, 64, 1).requires_grad_(False)
    points = torch.randn(8, 30, dtype=torch.float64)

    def by_names(x: Tensor) -> Tensor:
        for layer in model:
            y = layer(x)
            x = y
        return x[0]

    hessians = torch.vmap(torch.func.hessian(lambda x: model(x)[0]))
    with PeakBytes() as theirs:
        hessians(points)
    for func in (lambda x: model(x)[0], by_names):
        with PeakBytes() as ours:
            jacfunc.vmap(jacfunc.laplacian(func))(points)
        assert ours.peak < 0.41 * theirs.peak


class Straight(torch.autograd.Function):
    """A rounding whose derivative is 1: its own backward pass is what counts."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round() * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


def test_a_backward_pass_of_ones_own_is_honoured() -> None:
    func = lambda x: (Straight.apply(x) * x).sum()  # noqa: E731
    torch.testing.assert_close(jacfunc.laplacian(func)(X), looped(func, X))
    with torch.no_grad():
        torch.testing.assert_close(jacfunc.laplacian(func)(X), looped_free(func))


def looped_free(func: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        return looped(func, X)


class Doubled(TorchFunctionMode):
    """``tanh`` returns twice as much, as a mode that emulates hardware might let it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        return 2 * result if func is torch.tanh else result


@pytest.mark.parametrize("calls", [0, 20])
def test_modes_of_users_may_change_what_operations_return(calls: int) -> None:
    """Before calls of a kind are written down, and after that."""

    def func(x: Tensor, factor: float = 1.0) -> Tensor:
        return (torch.tanh(torch.tanh(x) * factor) * factor).sum()

    plain, doubled = looped(func, X), looped(partial(func, factor=2.0), X)
    doors: tuple[Callable[[Tensor], Any], ...] = (
        jacfunc.laplacian(func),
        jacfunc.vmap(jacfunc.laplacian(func)),
        lambda x: jacfunc.value_jacobian_laplacian(func)(x)[2],
        lambda x: jacfunc.hessian_diagonal(func)(x).sum(),
    )
    for number, door in enumerate(doors):
        at = X[None] if number == 1 else X
        for _ in range(calls):
            door(at)
        with Doubled():
            torch.testing.assert_close(door(at).squeeze(), doubled)
        torch.testing.assert_close(door(at).squeeze(), plain)


def test_torchscript_is_seen_past_the_functions_of_torch(caplog: Log) -> None:
    traced = torch.jit.trace(lambda x: (x.sin() * x).sum(), (X,), check_trace=False)
    with caplog.at_level("INFO", "jacfunc"):
        torch.testing.assert_close(jacfunc.laplacian(traced)(X), looped(traced, X))
    assert "past the functions of torch" in swept(caplog)[0]


def test_an_error_that_the_function_catches_does_not_hide_a_missing_rule(caplog: Log) -> None:
    def func(x: Tensor) -> Tensor:
        try:
            return x.exp().cumprod(0)[-1]
        except NotImplementedError:
            return x.sum()

    with caplog.at_level("INFO", "jacfunc"):
        torch.testing.assert_close(jacfunc.laplacian(func)(X), 3 * X.sum().exp())
    assert len(swept(caplog)) == 1


def test_constants_are_held_constant() -> None:
    def func(x: Tensor) -> Tensor:
        with torch.no_grad():
            weights = x.square()
        return (weights * x.square() + x.detach() * x**2).sum()

    torch.testing.assert_close(jacfunc.laplacian(func)(X), 2 * (X.square() + X).sum())


def test_branches_on_values_and_kinks() -> None:
    func = lambda x: x.square().sum() if x.sum() > 0 else x.sum()  # noqa: E731
    assert jacfunc.laplacian(func)(X) == 6
    assert jacfunc.laplacian(func)(-X) == 0
    assert jacfunc.vmap(jacfunc.laplacian(func))(torch.stack([X, -X])).tolist() == [6, 0]
    zero = torch.zeros(2, dtype=torch.float64)
    diagonal = jacfunc.hessian_diagonal(lambda x: F.relu(x) * x + x.abs() * x)(zero)
    assert diagonal.tolist() == [[0, 0], [0, 0]]


def test_dropout_has_one_mask() -> None:
    def func(x: Tensor) -> Tensor:
        return F.dropout(x.square(), 0.5)

    x = torch.ones(64, dtype=torch.float64)
    for chunk_size in (None, 7):
        value, jacobian, laplacian = jacfunc.value_jacobian_laplacian(func, chunk_size=chunk_size)(
            x
        )
        assert 0 < (value == 0).sum() < 64
        torch.testing.assert_close(jacobian.diagonal(), 2 * value)
        torch.testing.assert_close(laplacian, 2 * value)
    value, _, laplacian = jacfunc.value_jacobian_laplacian(lambda x: func(x) * x.prod())(x)
    assert ((value == 0) == (laplacian == 0)).all()


def test_a_tracked_tensor_says_that_it_requires_a_gradient() -> None:
    def func(x: Tensor) -> Tensor:
        y = x.sin()
        if y.requires_grad:
            y.register_hook(lambda cotangent: cotangent / 2)
        return y.sum()

    torch.testing.assert_close(jacfunc.laplacian(func)(X), looped(func, X))


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "by NumPy": (
        lambda x: torch.from_numpy(np.sin(x.detach().numpy())),
        "compute its outputs by torch",
    ),
    "by a number": (lambda x: torch.tensor(2 * x.sum().item()), "compute its outputs by torch"),
    "into out": (lambda x: torch.sum(x**2, 0, out=torch.empty(0).double()), "got a refusal"),
    "complex outputs": (lambda x: torch.exp(1j * x), "outputs must be real"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("door", [jacfunc.laplacian, jacfunc.hessian_diagonal])
def test_what_can_not_be_right_is_refused(name: str, door: Any) -> None:
    func, words = REFUSED[name]
    with pytest.raises((NotImplementedError, ValueError), match=words):
        door(func)(X)


def test_a_function_that_is_complex_inside_is_swept() -> None:
    func = lambda x: torch.view_as_real(torch.exp(1j * x)).sum()  # noqa: E731
    torch.testing.assert_close(jacfunc.laplacian(func)(X), -(X.sin() + X.cos()).sum())


# --- divergence ---


@pytest.mark.parametrize("strategy", ["auto", "forward", "reverse", "looped", jacfunc.Reverse(2)])
def test_the_divergence_is_the_trace_of_the_jacobian(strategy: Any) -> None:
    field = lambda x: x.square() * x.sum() + torch.sin(x.flip(0))  # noqa: E731
    expected = jacfunc.jacrev(field)(X).trace()
    torch.testing.assert_close(jacfunc.divergence(field, strategy=strategy)(X), expected)
    batch = jacfunc.vmap(jacfunc.divergence(field, strategy=strategy))(torch.stack([X, 2 * X]))
    torch.testing.assert_close(batch[0], expected)


def test_the_divergence_of_trees_shapes_and_aux() -> None:
    A = torch.randn(2, 3, dtype=torch.float64)
    curl = jacfunc.divergence(lambda A: (A**3, "aux"), has_aux=True, chunk_size=4)
    total, aux = curl(A)
    assert aux == "aux"
    torch.testing.assert_close(total, 3 * A.square().sum())
    pair = jacfunc.divergence(lambda x, A: (x * A.sum(), A.square()), argnums=(0, 1))(X, A)
    torch.testing.assert_close(pair, 3 * A.sum() + 2 * A.sum())
    forward = jacfunc.divergence(
        lambda x, A: (x * A.sum(), A.square()), (0, 1), strategy="forward", chunk_size=2
    )
    torch.testing.assert_close(forward(X, A), pair)
    assert jacfunc.divergence(lambda x: x)(torch.zeros(0)) == 0


def test_a_divergence_keeps_no_jacobian() -> None:
    x = torch.randn(1000)
    with PeakBytes() as counter:
        jacfunc.divergence(torch.sin, strategy="forward", chunk_size=10)(x)
    assert counter.peak < x.nbytes * 100


def test_a_loss_trains_through_a_divergence() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    jacfunc.divergence(lambda x: scale * x**3)(X).backward()
    torch.testing.assert_close(scale.grad, 3 * X.square().sum())


class Blocks:
    """A strategy that hands its products to no sink."""

    def materialize(self, operator: Any) -> Any:
        return jacfunc.Forward().materialize(operator)


@pytest.mark.parametrize("strategy", ["reverse", "forward", Blocks()])
def test_a_divergence_refuses_outputs_of_other_shapes(strategy: Any) -> None:
    with pytest.raises(
        ValueError, match=r"divergence: func must return tensors of the shapes .*3,"
    ):
        jacfunc.divergence(lambda x: x.sum(), strategy=strategy)(X)
    with pytest.raises(ValueError, match="divergence: func must return tensors of the shapes"):
        jacfunc.divergence(lambda x: x.T, strategy=strategy)(torch.ones(2, 3))
    assert jacfunc.divergence(lambda x: x**2, strategy=strategy)(X) == 2 * X.sum()
