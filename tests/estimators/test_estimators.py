"""Estimators against closed forms, against slow loops of their papers, and over many seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jacfunc.estimators import (
    Approximation,
    Hutchinson,
    HutchPlusPlus,
    Lanczos,
    StochasticLanczos,
    XDiag,
    XTrace,
)
from jacfunc.operators import diagonal, frobenius_norm, logdet, spectral_norm, trace
from tests.operators.dense import Dense, decaying, definite, normal, of_rank

SQUARE = normal(12, 12, seed=7)
SYMMETRIC = SQUARE + SQUARE.T
TRACES = {
    "Hutchinson": lambda seed: Hutchinson(6, seed=seed),
    "Hutchinson of normal numbers": lambda seed: Hutchinson(6, seed, "normal"),
    "HutchPlusPlus": lambda seed: HutchPlusPlus(9, seed=seed),
    "XTrace": lambda seed: XTrace(8, seed=seed),
}
DIAGONALS = {
    "Hutchinson": lambda seed: Hutchinson(6, seed=seed),
    "XDiag": lambda seed: XDiag(8, seed=seed),
}
EVERY = {
    **{f"trace by {name}": (trace, make) for name, make in TRACES.items()},
    **{f"diagonal by {name}": (diagonal, make) for name, make in DIAGONALS.items()},
    "norm by HutchPlusPlus": (frobenius_norm, TRACES["HutchPlusPlus"]),
    "norm by Lanczos": (spectral_norm, lambda seed: Lanczos(5, seed=seed)),
}


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-10) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def signs(count: int, size: int, seed: int) -> Tensor:
    """The sign vectors that estimators draw, in rows."""
    generator = torch.Generator().manual_seed(seed)
    bits = [torch.randint(2, (size,), generator=generator, dtype=torch.int8) for _ in range(count)]
    return torch.stack(bits).double() * 2 - 1


def normals(count: int, size: int, seed: int) -> Tensor:
    """The normal vectors that estimators draw, in rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]
    return torch.stack(rows)


def projector(columns: Tensor) -> Tensor:
    """Onto the space that columns span."""
    Q, _ = torch.linalg.qr(columns)
    return Q @ Q.T


# --- closed forms ---


@pytest.mark.parametrize(
    ("distribution", "variance"),
    [
        ("rademacher", 2 * (SYMMETRIC.square().sum() - SYMMETRIC.diagonal().square().sum())),
        ("normal", 2 * SYMMETRIC.square().sum()),
    ],
)
def test_hutchinson_has_the_variance_of_its_formula(distribution, variance):
    estimate = trace(Dense(SYMMETRIC), Hutchinson(20_000, 1, distribution, None))
    close(estimate.standard_error.square() * 20_000 / variance, 1, 0.05)
    assert (estimate.value - SYMMETRIC.trace()).abs() < 4 * (variance / 20_000).sqrt()


def test_of_the_diagonal_it_has_the_variance_of_its_formula():
    estimate = diagonal(Dense(SQUARE), Hutchinson(20_000, 1))
    variance = SQUARE.square().sum(1) - SQUARE.diagonal().square()
    close(estimate.standard_error.square() * 20_000 / variance, torch.ones(12), 0.06)
    assert ((estimate.value - SQUARE.diagonal()).abs() < 4.5 * (variance / 20_000).sqrt()).all()


def test_signs_are_exact_of_diagonal_matrices():
    A = Dense(torch.diag(normal(9)))
    for estimate in (trace(A, Hutchinson(3)), diagonal(A, Hutchinson(3))):
        assert (estimate.standard_error == 0).all()
    close(trace(A, Hutchinson(3)).value, A.entries.trace())
    close(diagonal(A, Hutchinson(3)).value, A.entries.diagonal())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_matrices_of_low_rank_are_exact(rank):
    entries = of_rank(rank, 40) if rank else torch.zeros(40, 40, dtype=torch.float64)
    for estimator in (HutchPlusPlus(12), XTrace(8)):
        estimate = trace(Dense(entries), estimator)
        close(estimate.value, entries.trace(), 1e-9)
        assert estimate.standard_error < 1e-9
    estimate = diagonal(Dense(entries), XDiag(8))
    close(estimate.value, entries.diagonal(), 1e-9)
    assert (estimate.standard_error < 1e-9).all()


def test_multiples_of_the_identity_are_exact():
    A = Dense(3 * torch.eye(50, dtype=torch.float64))
    for estimator in (Hutchinson(4), HutchPlusPlus(9), XTrace(10)):
        estimate = trace(A, estimator)
        assert estimate.standard_error < (1e-10 if estimator != HutchPlusPlus(9) else 20)
    close(trace(A, XTrace(10)).value, 150)
    close(trace(A, Hutchinson(4)).value, 150)
    close(spectral_norm(A, Lanczos(3)).value, 3)
    close(logdet(A, StochasticLanczos(2, 2)).value, 50 * math.log(3))
    close(logdet(A, StochasticLanczos(2, 9), damping=1.0).value, 50 * math.log(4))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_as_many_products_as_rows_give_the_exact_number(size):
    A = Dense(SQUARE[:size, :size].clone())
    for estimator in (HutchPlusPlus(6), XTrace(6)):
        assert trace(A, estimator) == Approximation(trace(A), torch.zeros(()).double())
    assert diagonal(A, XDiag(6)).value.equal(A.entries.diagonal())


# --- the algorithms, as papers write them ---


def test_hutch_plus_plus_is_algorithm_1():
    A, third = SQUARE, 3
    rows = signs(2 * third, 12, 5)
    Q, _ = torch.linalg.qr(A @ rows[:third].T)
    rest = torch.eye(12, dtype=torch.float64) - Q @ Q.T
    forms = [g @ rest @ A @ rest @ g for g in rows[third:]]
    expected = (Q.T @ A @ Q).trace() + sum(forms) / third
    estimate = trace(Dense(A), HutchPlusPlus(9, seed=5))
    close(estimate.value, expected)
    close(estimate.standard_error, torch.stack(forms).std() / third**0.5)


def test_xtrace_leaves_each_vector_out_once():
    A, half = SQUARE, 4
    rows, estimates = normals(half, 12, 5), []
    for i in range(half):
        others = torch.cat([rows[:i], rows[i + 1 :]]).T
        P = projector(A @ others)
        rest = rows[i] - P @ rows[i]
        rest = rest * ((12 - half + 1) / (rest @ rest)).sqrt()
        estimates.append((P @ A).trace() + rest @ A @ rest)
    estimate, every = trace(Dense(A), XTrace(8, seed=5)), torch.stack(estimates)
    close(estimate.value, every.mean())
    close(estimate.standard_error, every.std() / half**0.5)


def test_xdiag_leaves_each_vector_out_once():
    A, half = SQUARE, 4
    rows, estimates = signs(half, 12, 5), []
    for i in range(half):
        P = projector(A @ torch.cat([rows[:i], rows[i + 1 :]]).T)
        estimates.append((P @ A).diagonal() + rows[i] * (A @ rows[i] - P @ A @ rows[i]))
    estimate, every = diagonal(Dense(A), XDiag(8, seed=5)), torch.stack(estimates)
    close(estimate.value, every.mean(0))
    close(estimate.standard_error, every.std(0) / half**0.5)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_whole_krylov_spaces_give_the_logarithm_of_the_matrix(damping):
    A, rows = definite(12), signs(5, 12, 3)
    values, vectors = torch.linalg.eigh(A)
    logarithm = (vectors * (values + damping).log()) @ vectors.T
    forms = ((rows @ logarithm) * rows).sum(1)
    estimate = logdet(Dense(A), StochasticLanczos(5, 50, seed=3), damping=damping)
    close(estimate.value, forms.mean())
    close(estimate.standard_error, forms.std() / 5**0.5)


def test_few_steps_are_near_where_eigenvalues_are_bounded_away_from_zero():
    A, whole = Dense(definite(100)), StochasticLanczos(4, 100)
    expected = logdet(A, whole).value
    close(logdet(A, StochasticLanczos(4, 12)).value, expected, 1e-6)


def test_a_krylov_space_that_ends_is_no_error():
    entries = torch.diag(torch.tensor([2.0, 2.0, 2.0, 5.0, 5.0, 5.0], dtype=torch.float64))
    close(logdet(Dense(entries), StochasticLanczos(3)).value, entries.logdet())
    small = logdet(Dense(1e-8 * entries), StochasticLanczos(3)).value
    close(small, (1e-8 * entries).logdet())


# --- over many seeds ---


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_unbiased_and_errors_honest(name):
    runs = [trace(Dense(SQUARE), TRACES[name](seed)) for seed in range(400)]
    values = torch.stack([run.value for run in runs])
    errors = torch.stack([run.standard_error for run in runs])
    assert (values.mean() - SQUARE.trace()).abs() < 4 * values.std() / 20
    # samples that share a basis are not quite independent
    assert 0.6 < errors.square().mean() / values.var() < 1.7


@pytest.mark.parametrize("name", DIAGONALS)
def test_diagonals_are_unbiased_and_errors_honest(name):
    runs = [diagonal(Dense(SQUARE), DIAGONALS[name](seed)) for seed in range(400)]
    values = torch.stack([run.value for run in runs])
    errors = torch.stack([run.standard_error for run in runs])
    assert ((values.mean(0) - SQUARE.diagonal()).abs() < 4 * values.std(0) / 20).all()
    assert 0.5 < (errors.square().mean(0) / values.var(0)).mean() < 2


def test_the_squared_norm_is_unbiased():
    wide = normal(6, 15, seed=9)
    for entries in (wide, wide.T):
        runs = [frobenius_norm(Dense(entries), Hutchinson(6, seed=s)).value for s in range(400)]
        squares = torch.stack(runs).square()
        assert (squares.mean() - entries.square().sum()).abs() < 4 * squares.std() / 20
    estimate = frobenius_norm(Dense(wide), XTrace(4))
    squared = trace(Dense(wide @ wide.T), XTrace(4))
    close(estimate.value, squared.value.sqrt())
    close(estimate.standard_error, squared.standard_error / (2 * squared.value.sqrt()))


def test_the_log_determinant_is_unbiased_and_its_error_honest():
    A = Dense(definite(12))
    runs = [logdet(A, StochasticLanczos(5, 12, seed)) for seed in range(300)]
    values = torch.stack([run.value for run in runs])
    errors = torch.stack([run.standard_error for run in runs])
    assert (values.mean() - A.entries.logdet()).abs() < 4 * values.std() / 300**0.5
    assert 0.7 < errors.square().mean() / values.var() < 1.4


def test_where_eigenvalues_fall_a_basis_is_worth_its_products():
    A = Dense(decaying(150))
    hutchinson, plus_plus, xtrace = (
        torch.stack([trace(A, make(seed)).value - A.entries.trace() for seed in range(20)])
        .square()
        .mean()
        .sqrt()
        for make in (
            lambda s: Hutchinson(60, s),
            lambda s: HutchPlusPlus(60, s),
            lambda s: XTrace(60, s),
        )
    )
    assert xtrace < plus_plus / 2 < hutchinson / 4


# --- the spectral norm ---


@pytest.mark.parametrize("shape", [(30, 30), (12, 40), (40, 12), (1, 5), (5, 1), (1, 1)])
def test_lanczos_finds_the_largest_singular_value(shape):
    entries = normal(*shape, seed=11)
    exact = torch.linalg.matrix_norm(entries, 2)
    close(spectral_norm(Dense(entries), Lanczos(tolerance=1e-12)).value, exact)
    few = spectral_norm(Dense(entries), Lanczos(4, tolerance=0.0))
    assert few.value < exact * (1 + 1e-12)
    near = (torch.linalg.svdvals(entries) - few.value).abs().min()
    assert near <= few.standard_error + 1e-12


def test_lanczos_ends_when_it_is_good_enough():
    A = Dense(decaying(200))
    rough = spectral_norm(A, Lanczos(tolerance=1e-2))
    taken = A.pushed
    assert rough.standard_error <= 1e-2 * rough.value
    spectral_norm(A, Lanczos(tolerance=1e-10))
    assert taken < A.pushed - taken < 100
    assert spectral_norm(Dense(torch.zeros(4, 7)), Lanczos()).value == 0


# --- what they cost, and what they leave alone ---


def test_products_are_as_many_as_is_said():
    A = Dense(normal(200, 200))
    trace(A, Hutchinson(10))
    assert (A.pushed, A.pulled) == (10, 0)
    trace(A, HutchPlusPlus(32))
    assert (A.pushed, A.pulled) == (40, 0)
    trace(A, XTrace(21))
    assert (A.pushed, A.pulled) == (60, 0)
    diagonal(A, XDiag(20))
    assert (A.pushed, A.pulled) == (70, 10)
    spectral_norm(A, Lanczos(5, tolerance=0.0))
    assert (A.pushed, A.pulled) == (76, 15)
    definite_one = Dense(definite(200))
    logdet(definite_one, StochasticLanczos(4, 7))
    assert (definite_one.pushed, definite_one.pulled) == (28, 0)


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_fixes_the_result(name):
    door, make = EVERY[name]
    one, same, other = (door(Dense(SQUARE), make(seed)) for seed in (1, 1, 2))
    assert one.value.equal(same.value)
    assert one.standard_error.equal(same.standard_error)
    assert not one.value.equal(other.value)


@pytest.mark.parametrize(
    ("door", "kind"),
    [
        (trace, Hutchinson),
        (trace, HutchPlusPlus),
        (trace, XTrace),
        (diagonal, Hutchinson),
        (diagonal, XDiag),
        (logdet, StochasticLanczos),
    ],
)
def test_chunks_change_nothing(door, kind):
    A = Dense(definite(40))
    whole, *chunked = (door(A, kind(12, chunk_size=size)) for size in (None, 1, 5, 12))
    for estimate in chunked:
        close(estimate.value, whole.value)
        close(estimate.standard_error, whole.standard_error)


@pytest.mark.parametrize("name", EVERY)
def test_generators_are_left_alone(name):
    door, make = EVERY[name]
    before = torch.get_rng_state()
    door(Dense(SQUARE), make(0))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_low_precision_is_computed_in_float32(name, dtype):
    door, make = EVERY[name]
    entries = (definite(12) / 4).to(dtype)
    low, high = (door(Dense(x), make(0)) for x in (entries, entries.double()))
    assert low.value.dtype == (dtype if door is diagonal else torch.float32)
    torch.testing.assert_close(low.value.double(), high.value, rtol=0.05, atol=0.02)


def test_estimators_of_ones_own_are_objects_with_a_method():
    class First:
        def estimate_trace(self, matrix):
            unit = torch.zeros(1, matrix.shape[1], dtype=matrix.dtype)
            unit[0, 0] = 1
            value = matrix.push(unit)[0, 0] * matrix.shape[1]
            return Approximation(value, torch.zeros(()))

    assert trace(Dense(SQUARE), First()).value == 12 * SQUARE[0, 0]
