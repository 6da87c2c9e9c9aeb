"""Traces, diagonals, norms and determinants of operators: exact, on trees, and differentiated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import jacfunc
from jacfunc._memory import PeakBytes
from jacfunc.estimators import Hutchinson, HutchPlusPlus, Lanczos, StochasticLanczos, XDiag, XTrace
from jacfunc.operators import diagonal, frobenius_norm, linearize, logdet, spectral_norm, trace
from tests.operators.dense import Dense, definite, normal

SHAPES = [(1, 1), (5, 5), (3, 7), (7, 3)]
SQUARES = [shape for shape in SHAPES if shape[0] == shape[1]]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SQUARES)
def test_exact_numbers_of_square_matrices(shape):
    entries = normal(*shape)
    close(trace(Dense(entries)), entries.trace())
    close(diagonal(Dense(entries)), entries.diagonal())
    close(logdet(Dense(entries)), torch.linalg.slogdet(entries).logabsdet)
    damped = entries + 0.7 * torch.eye(len(entries), dtype=entries.dtype)
    close(logdet(Dense(entries), damping=0.7), torch.linalg.slogdet(damped).logabsdet)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_norms(shape):
    entries = normal(*shape)
    A = Dense(entries)
    close(frobenius_norm(A), torch.linalg.matrix_norm(entries))
    assert A.pushed + A.pulled == min(shape)
    close(spectral_norm(A), torch.linalg.matrix_norm(entries, 2))


def test_a_singular_matrix_has_minus_infinity():
    assert logdet(Dense(torch.zeros(3, 3))) == -torch.inf


def point() -> dict[str, Tensor]:
    return {"b": normal(2, 3), "a": normal(4, seed=1)}


def mixed(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    b, a = tree["b"], tree["a"]
    return {"b": b.sin() * a.sum(), "a": a**3 + b.sum()}


def test_trees_have_diagonals_that_are_trees():
    _, J = linearize(mixed, point())
    dense = J.matrix()
    exact = diagonal(J)
    assert list(exact) == ["b", "a"]
    assert exact["b"].shape == (2, 3)
    close(J.domain.flat(exact), dense.diagonal())
    close(exact["a"], 3 * point()["a"] ** 2)
    estimate = diagonal(J, Hutchinson(50))
    off = J.domain.flat(estimate.value) - dense.diagonal()
    assert (off.abs() < 5 * J.domain.flat(estimate.standard_error)).all()
    close(trace(J), dense.trace())
    close(frobenius_norm(J), torch.linalg.matrix_norm(dense))
    close(spectral_norm(J, Lanczos(tolerance=1e-12)).value, torch.linalg.matrix_norm(dense, 2))


def test_combinations_of_operators_are_reduced_as_any():
    _, J = linearize(mixed, point())
    dense = J.matrix()
    close(trace(J.T @ J), dense.square().sum())
    combined = diagonal((J + 2 * J.T).T @ J)
    close(J.domain.flat(combined), ((dense + 2 * dense.T).T @ dense).diagonal())
    close(trace(J.restrict("a", "a")), 3 * point()["a"].square().sum())
    close(0.5 * logdet(J.T @ J), torch.linalg.slogdet(dense).logabsdet, 1e-8)
    exact = logdet(J.T @ J, damping=1.0)
    estimate = logdet(J.T @ J, StochasticLanczos(50, 10), damping=1.0)
    assert (estimate.value - exact).abs() < 4 * estimate.standard_error


def test_an_operator_may_know_its_diagonal_itself():
    class Known(Dense):
        def diagonal(self):
            return self.entries.diagonal()

    A = Known(normal(4, 4))
    assert diagonal(A).equal(A.entries.diagonal())
    close(trace(A), A.entries.trace())
    assert A.pushed == A.pulled == 0


def test_infinite_derivatives_do_not_spoil_other_rows():
    _, J = linearize(lambda x, y: (x.sqrt(), y * 2), torch.zeros(2), torch.ones(2))
    assert trace(J) == torch.inf
    infinite, finite = diagonal(J)
    assert infinite.isinf().all()
    assert finite.equal(torch.full((2,), 2.0))


def test_exact_reductions_take_the_memory_of_a_chunk():
    size = 3000
    _, J = linearize(torch.sin, torch.ones(size))
    for door in (trace, diagonal, frobenius_norm):
        with PeakBytes() as counter:
            door(J)
        assert counter.peak < size**2 * 4 / 3


@pytest.mark.parametrize("door", [trace, frobenius_norm, spectral_norm, logdet])
def test_exact_numbers_are_differentiated_by_the_point(door):
    x = normal(3).requires_grad_()

    def number(x: Tensor) -> Tensor:
        return door(linearize(lambda y: torch.stack([y.prod(), y.sin().sum(), y @ y]), x)[1])

    assert torch.autograd.gradcheck(number, (x,))


@pytest.mark.parametrize("estimator", [Hutchinson(5), XTrace(4), HutchPlusPlus(6)])
def test_the_derivative_of_a_trace_is_the_estimate_of_the_derivative(estimator):
    """Of diagonal matrices signs are exact, and so are bases of diagonal matrices of rank one."""
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    fixed = normal(20, seed=3)
    _, J = linearize(lambda x: scale * fixed * (fixed @ x), normal(20))
    if isinstance(estimator, Hutchinson):
        _, J = linearize(lambda x: scale * fixed * x, normal(20))
    estimate = trace(J, estimator).value
    (slope,) = torch.autograd.grad(estimate, scale)
    close(slope, estimate.detach() / 1.5)


def test_derivatives_of_estimates_are_unbiased():
    def slopes(make, door=trace):
        x = normal(9).requires_grad_()
        _, J = linearize(lambda x: torch.sin(A @ x) * x.sum(), x)
        every = [
            torch.autograd.grad(door(J, make(seed)).value, x, retain_graph=True)[0]
            for seed in range(200)
        ]
        return torch.stack(every)

    A, x = normal(9, 9, seed=5), normal(9).requires_grad_()
    exact = torch.autograd.functional.jacobian(
        lambda x: torch.sin(A @ x) * x.sum(), x, create_graph=True
    ).trace()
    (expected,) = torch.autograd.grad(exact, x)
    for make in (
        lambda seed: Hutchinson(4, seed),
        lambda seed: HutchPlusPlus(6, seed),
        lambda seed: XTrace(6, seed),
    ):
        every = slopes(make)
        assert ((every.mean(0) - expected).abs() < 4.5 * every.std(0) / 200**0.5).all()


def test_the_derivative_of_a_spectral_norm_is_that_of_its_singular_vectors():
    scale = normal(6, seed=2).requires_grad_()
    A = normal(6, 4)
    exact = torch.linalg.matrix_norm(scale[:, None] * A, 2)
    _, J = linearize(lambda x: scale * (A @ x), normal(4))
    estimate = spectral_norm(J, Lanczos(tolerance=1e-12)).value
    close(*(torch.autograd.grad(x, scale)[0] for x in (estimate, exact)))


def test_the_derivative_of_a_log_determinant_is_that_of_its_quadrature():
    A, scale = definite(8), (normal(8).abs() + 1).requires_grad_()
    signs = StochasticLanczos(6, 8, seed=4)
    _, J = linearize(lambda x: scale * (A @ (scale * x)), normal(8))
    estimate = logdet(J, signs, damping=0.5).value
    (slope,) = torch.autograd.grad(estimate, scale)
    # the mean of ωᵀ (B + 0.5)⁻¹ dB ω, for B = diag(s) A diag(s)
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(2, (8,), generator=generator, dtype=torch.int8) for _ in range(6)]
    vectors = torch.stack(rows).double() * 2 - 1
    B = scale[:, None] * A * scale
    solved = torch.linalg.solve(B.detach() + 0.5 * torch.eye(8).double(), vectors.T).T
    (expected,) = torch.autograd.grad((solved * (vectors @ B)).sum() / 6, scale)
    close(slope, expected, 1e-8)


@pytest.mark.parametrize(
    ("reduce", "estimator"),
    [
        (spectral_norm, Lanczos(tolerance=1e-12)),
        (logdet, StochasticLanczos(4, 6)),
        (trace, XTrace(4)),
    ],
)
def test_transforms_differentiate_estimates_as_autograd_does(reduce, estimator):
    B, x = definite(6), normal(6)

    def number(x: Tensor) -> Tensor:
        return reduce(linearize(lambda x: B @ x + 0.1 * x**3, x)[1], estimator).value

    followed = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(number(followed), followed)
    close(torch.func.grad(number)(x), expected)
    direction = normal(6, seed=1)
    _, pushed = torch.func.jvp(number, (x,), (direction,))
    close(pushed, expected @ direction)


@pytest.mark.parametrize("estimator", [None, Hutchinson(3), HutchPlusPlus(6), XTrace(6)])
def test_traces_are_mapped_over_points(estimator):
    points = normal(4, 7)
    A = normal(7, 7, seed=8)

    def number(x: Tensor) -> Tensor:
        result = trace(linearize(lambda x: torch.sin(A @ x), x)[1], estimator)
        return result if estimator is None else result.value

    close(torch.vmap(number)(points), torch.stack([number(x) for x in points]))
    gradients = torch.vmap(torch.func.grad(number))(points)
    close(gradients[1], torch.func.grad(number)(points[1]))


def test_a_divergence_is_a_trace():
    def field(x: Tensor) -> Tensor:
        return torch.stack([x[0] ** 2 * x[1], x[1].exp() + x[2], x[0] * x[2]])

    x = normal(3)
    expected = 2 * x[0] * x[1] + x[1].exp() + x[0]
    close(trace(linearize(field, x)[1]), expected)


def test_gauss_newton_like_operators_are_reduced_without_their_matrix():
    """Of a module of 10⁴ parameters the squared norm of J is the trace of Jᵀ J, by few products."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(60, 100), torch.nn.Tanh(), torch.nn.Linear(100, 8))
    inputs = torch.randn(5, 60)
    params = {name: p.detach() for name, p in model.named_parameters()}
    _, J = jacfunc.linearize(lambda p: torch.func.functional_call(model, p, inputs), params)
    exact = frobenius_norm(J)
    estimate = frobenius_norm(J, XTrace(30))
    assert (estimate.value - exact).abs() < 5 * estimate.standard_error
    assert diagonal(J.T @ J, XDiag(20)).value["0.weight"].shape == (100, 60)
