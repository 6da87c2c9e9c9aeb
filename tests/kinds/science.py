"""Functions of science: special functions, statistics, differential equations, filters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

from tests.kinds.functions import C3, C33, C34, C44, FunctionKind, family, integers, numbers
from tests.kinds.problems import Args, constant, eye, values

SCIENCE_KINDS: list[FunctionKind] = []
BOTH = {"argnums": (0, 1)}
ALL3 = {"argnums": (0, 1, 2)}

# --- special functions ---

add = family("Special functions", SCIENCE_KINDS)

add("error_functions", lambda x: x.erf() * torch.special.erfcx(x) + (x.tanh() / 2).erfinv(), (3,))
add("log_gamma", lambda x: torch.lgamma(x.exp()) * torch.digamma(x.exp() + 1), (3,))
add(
    "polygamma",
    lambda x: torch.polygamma(1, x.exp()) + torch.special.multigammaln(x.exp() + 2, 2),
    (3,),
)
add("bessel_i", lambda x: torch.special.i0(x) * torch.special.i1(x) + torch.special.i0e(x), (3,))
add("bessel_j", lambda x: torch.special.bessel_j0(x) * x, (3,))
add("chebyshev_polynomial", lambda x: torch.special.chebyshev_polynomial_t(x, 2) * x, (3,))
add(
    "bessel_j_in_part",
    lambda x: torch.special.bessel_j1(x.detach()) * x,
    (3,),
    unsure="a factor is held constant",
)
add("normal_cdf", lambda x: torch.special.ndtr(x) * torch.special.log_ndtr(x), (3,))
add("normal_quantile", lambda x: torch.special.ndtri(x.sigmoid()), (3,))
add("logit_expit", lambda x: torch.logit(x.sigmoid() * 0.9) * torch.special.expit(x), (3,))
add("entropies", lambda x: torch.special.entr(x.exp()) + torch.special.xlog1py(x, x.exp()), (3,))
add("xlogy", lambda x, y: torch.xlogy(x, y.exp()), (3,), (3,), **BOTH)
add("sinc", lambda x: torch.sinc(x) * x.exp2(), (3,))
add("sinc_at_zero", torch.sinc, make=numbers([0.0, 0.5]))
add("incomplete_gamma", lambda x: torch.special.gammainc(C3(x).exp(), x.exp()), (3,))
add("incomplete_gamma_by_order", lambda a: torch.special.gammainc(a.exp(), C3(a).exp()), (3,))
add("hurwitz_zeta", lambda q: torch.special.zeta(torch.full_like(q, 2.5), q.exp() + 1), (3,))
add("log_add_exp", lambda x, y: torch.logaddexp(x, y) - torch.logaddexp2(x, y), (3,), (3,), **BOTH)

# --- distributions ---

add = family("Distributions", SCIENCE_KINDS)


def unchecked(kind: type, *parameters: Any) -> Any:
    """Without the checks, which branch on data."""
    return kind(*parameters, validate_args=False)


def mixture(x: Tensor, logits: Tensor, means: Tensor) -> Tensor:
    parts = unchecked(D.Normal, means, torch.ones_like(means))
    return unchecked(D.MixtureSameFamily, unchecked(D.Categorical, None, logits), parts).log_prob(x)


def multivariate(x: Tensor, mean: Tensor, L: Tensor) -> Tensor:
    scale = L.tril(-1) + L.diagonal().exp().diag()
    return D.MultivariateNormal(mean, scale_tril=scale, validate_args=False).log_prob(x)


def tanh_normal(x: Tensor, mean: Tensor) -> Tensor:
    base = unchecked(D.Normal, mean, 1.0)
    squashed = D.TransformedDistribution(base, [D.TanhTransform()], validate_args=False)
    return squashed.log_prob(x.tanh() * 0.9)


def low_rank(x: Tensor, W: Tensor) -> Tensor:
    return D.LowRankMultivariateNormal(
        torch.zeros_like(x), W, torch.ones_like(x), validate_args=False
    ).log_prob(x)


def reparametrized(mean: Tensor, scale: Tensor) -> Tensor:
    return D.Normal(mean, scale.exp()).rsample().square()


def evidence_lower_bound(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    z = mean + eps * (logvar / 2).exp()
    prior = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum()
    return F.binary_cross_entropy_with_logits(C33(z) @ z, C3(z).sigmoid()) + prior


def coupling_flow(x: Tensor) -> Tensor:
    a, b = x.chunk(2)
    scale = (C44(x)[:2, :2] @ a).tanh()
    moved = torch.cat([a, b * scale.exp() + a.sin()])
    return -0.5 * moved.square().sum() + scale.sum()


def normal_checked(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return D.Normal(mean, scale.exp()).log_prob(x)


add("normal", lambda x, m, s: unchecked(D.Normal, m, s.exp()).log_prob(x), (3,), (3,), (3,), **ALL3)
add("normal_checked", normal_checked, (3,), (3,), (3,), **ALL3)
add(
    "gamma",
    lambda x, a, b: unchecked(D.Gamma, a.exp(), b.exp()).log_prob(x.exp()),
    (2,),
    (2,),
    (2,),
    **ALL3,
)
add("gamma_checked", lambda x, a: D.Gamma(a.exp(), a.exp()).log_prob(x.exp()), (2,), (2,), **BOTH)
add(
    "beta",
    lambda x, a: unchecked(D.Beta, a.exp(), a.exp() + 1).log_prob(x.sigmoid()),
    (2,),
    (2,),
    **BOTH,
)
add(
    "dirichlet",
    lambda x, a: unchecked(D.Dirichlet, a.exp()).log_prob(x.softmax(0)),
    (3,),
    (3,),
    **BOTH,
)
add("student_t", lambda x, df: unchecked(D.StudentT, df.exp() + 2).log_prob(x), (2,), (2,), **BOTH)
add(
    "laplace_gumbel",
    lambda x: (
        unchecked(D.Laplace, 0.1, 2.0).log_prob(x)
        + unchecked(D.Gumbel, x.new_tensor(0.0), x.new_tensor(1.0)).log_prob(x)
    ),
    (3,),
)
add(
    "log_normal",
    lambda x, m: unchecked(D.LogNormal, m, m.exp()).log_prob(x.exp()),
    (2,),
    (2,),
    **BOTH,
)
add("poisson", lambda r: unchecked(D.Poisson, r.exp()).log_prob(integers(r, 2, 0, 5)), (3,))
add(
    "negative_binomial",
    lambda p: unchecked(D.NegativeBinomial, 3.0, p.sigmoid()).log_prob(integers(p, 2, 0, 5)),
    (3,),
)
add("categorical", lambda x: unchecked(D.Categorical, None, x).log_prob(integers(x, 2, 0)), (3,))
add("categorical_entropy", lambda x: D.Categorical(logits=x).entropy(), (2, 3))
add(
    "bernoulli",
    lambda x: D.Bernoulli(logits=x, validate_args=False).log_prob(C3(x).gt(0).to(x)),
    (3,),
)
add(
    "von_mises",
    lambda x, k: unchecked(D.VonMises, x.new_tensor(0.1), k.exp()).log_prob(x),
    (2,),
    (2,),
    **BOTH,
)
add("multivariate_normal", multivariate, (2,), (2,), (2, 2), **ALL3)
add(
    "multivariate_normal_checked",
    lambda x, C: D.MultivariateNormal(torch.zeros_like(x), C @ C.T + eye(2, C)).log_prob(x),
    (2,),
    (2, 2),
    **BOTH,
)
add("low_rank_normal", low_rank, (3,), (3, 1), **BOTH)
add("mixture", mixture, (), (2,), (2,), **ALL3)
add("tanh_normal", tanh_normal, (2,), (2,), **BOTH)
add(
    "kl_of_normals",
    lambda m, s: D.kl_divergence(
        unchecked(D.Normal, m, s.exp()),
        unchecked(D.Normal, torch.zeros_like(m), torch.ones_like(m)),
    ),
    (2,),
    (2,),
    **BOTH,
)
add(
    "kl_of_gammas",
    lambda a: D.kl_divergence(
        unchecked(D.Gamma, a.exp(), a.exp()), unchecked(D.Gamma, a.exp() + 1, 2 * a.exp())
    ),
    (2,),
)
add("reparametrized_sample", reparametrized, (2,), (2,), unsure="random", **BOTH)
add("evidence_lower_bound", evidence_lower_bound, (3,), (3,), (3,), **BOTH)
add("coupling_flow", coupling_flow, (4,))

# --- differential equations ---

add = family("Differential equations", SCIENCE_KINDS)


def lorenz(u: Tensor) -> Tensor:
    x, y, z = u
    return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def runge_kutta(field: Callable[[Tensor], Tensor], u: Tensor, h: float, steps: int) -> Tensor:
    for _ in range(steps):
        k1 = field(u)
        k2 = field(u + h / 2 * k1)
        k3 = field(u + h / 2 * k2)
        k4 = field(u + h * k3)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return u


def trajectory(u: Tensor) -> Tensor:
    path = [u]
    for _ in range(3):
        path.append(path[-1] + 0.1 * (C33(u) @ path[-1]).tanh())
    return torch.stack(path)


def leapfrog(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(2):
        p = p - 0.05 * q.sin()
        q = q + 0.1 * p
        p = p - 0.05 * q.sin()
    return q, p


def implicit_euler(u: Tensor) -> Tensor:
    """One step, its Newton iterations unrolled."""
    new, identity = u, eye(3, u)
    for _ in range(3):
        residual = new - u - 0.1 * (C33(u) @ new.sin())
        slope = identity - 0.1 * C33(u) * new.cos()
        new = new - torch.linalg.solve(slope, residual)
    return new


def adaptive(u: Tensor) -> Tensor:
    """The steps depend on the data, as in every solver with an error control."""
    t, h = 0.0, 0.4
    while t < 0.5:
        coarse, fine = u - h * u**3, u - h / 2 * u**3
        fine = fine - h / 2 * fine**3
        if (fine - coarse).abs().max() > 0.02:
            h /= 2
            continue
        t, u = t + h, fine
    return u


def neural_ode(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return runge_kutta(lambda u: params["w"] @ u.tanh() + params["b"], x, 0.2, 1)


def crank_nicolson(u: Tensor) -> Tensor:
    n = len(u)
    ones = torch.ones(n - 1, dtype=u.dtype, device=u.device)
    A = 0.1 * (torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * eye(n, u))
    return torch.linalg.solve(eye(n, u) - A, u + A @ u + 0.1 * u**2)


def shooting(slope: Tensor) -> Tensor:
    """Boundary value problem y'' = sin y as a residual."""
    state = torch.cat([torch.zeros_like(slope), slope])
    field = lambda s: torch.stack([s[1], s[0].sin()])  # noqa: E731
    return runge_kutta(field, state, 0.25, 2)[:1] - 1


def euler_maruyama(x: Tensor, noise: Tensor) -> Tensor:
    for dw in noise:
        x = x + 0.1 * x.sin() + 0.3 * x * dw
    return x


def parameters(device: str, dtype: torch.dtype) -> Args:
    tree = {
        "w": values(1, 2, 2, device=device, dtype=dtype),
        "b": values(2, 2, device=device, dtype=dtype),
    }
    return tree, values(3, 2, device=device, dtype=dtype)


def from_heat(u: Tensor) -> Tensor:
    right, left = torch.roll(u, -1), torch.roll(u, 1)
    return u + 0.1 * (right - 2 * u + left)


def upwind(u: Tensor) -> Tensor:
    forward, backward = torch.roll(u, -1) - u, u - torch.roll(u, 1)
    return u - 0.1 * u * torch.where(u > 0, backward, forward)


def laplacian_by_conv(u: Tensor) -> Tensor:
    kernel = u.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return F.conv2d(u[None, None], kernel[None, None], padding=1)[0, 0] + u.exp()


def gray_scott(fields: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    u, v = fields

    def spread(f: Tensor) -> Tensor:
        return sum(torch.roll(f, s, d) for s in (1, -1) for d in (0, 1)) - 4 * f

    reaction = u * v * v
    return u + 0.2 * spread(u) - reaction + 0.04 * (1 - u), v + 0.1 * spread(v) + reaction - 0.1 * v


def shallow_water(h: Tensor, hu: Tensor) -> tuple[Tensor, Tensor]:
    depth = h.exp() + 1
    flux = hu * hu / depth + 0.5 * depth**2
    difference = lambda f: (torch.roll(f, -1) - torch.roll(f, 1)) / 2  # noqa: E731
    return h - 0.1 * difference(hu), hu - 0.1 * difference(flux)


def minmod(u: Tensor) -> Tensor:
    a, b = torch.diff(u)[1:], torch.diff(u)[:-1]
    limited = torch.where(a * b > 0, torch.where(a.abs() < b.abs(), a, b), torch.zeros_like(a))
    return u[1:-1] - 0.3 * limited * u[1:-1]


def jacobi_iterations(f: Tensor) -> Tensor:
    u = torch.zeros_like(f)
    for _ in range(2):
        p = F.pad(u, (1, 1, 1, 1))
        u = (p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - f + 0.1 * u**2) / 4
    return u


def interior_updated(u: Tensor) -> Tensor:
    """As ported from numpy: the interior is written in place."""
    new = u.clone()
    new[1:-1] = u[1:-1] + 0.1 * (u[2:] - 2 * u[1:-1] + u[:-2])
    new[0] = 0
    return new * u


add("euler_trajectory", trajectory, (3,))
add("runge_kutta_lorenz", lambda u: runge_kutta(lorenz, u, 0.01, 2), (3,))
add("leapfrog", leapfrog, (2,), (2,), **BOTH)
add("implicit_euler", implicit_euler, (3,))
add("adaptive_steps", adaptive, make=numbers([1.0, 0.5]), other=numbers([0.1, 1.8]))
add("neural_ode", neural_ode, make=parameters)
add("crank_nicolson", crank_nicolson, (4,))
add("shooting", shooting, (1,))
add("euler_maruyama", euler_maruyama, (2,), (3, 2), **BOTH)
add("heat_equation", from_heat, (5,))
add("upwind_advection", upwind, (5,))
add("laplacian_by_conv", laplacian_by_conv, (3, 3))
add(
    "gray_scott",
    gray_scott,
    make=lambda d, t: ((values(1, 2, 2, device=d, dtype=t), values(2, 2, 2, device=d, dtype=t)),),
)
add("shallow_water", shallow_water, (3,), (3,), **BOTH)
add("minmod_limiter", minmod, (6,))
add("jacobi_iterations", jacobi_iterations, (3, 3))
add("interior_updated", interior_updated, (5,))

# --- kernels, filters ---

add = family("Kernels, Gaussian processes, filters", SCIENCE_KINDS)

Y4 = constant(41, 4)


def gram(x: Tensor, y: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    return torch.exp(-0.5 * (x[:, None] - y[None]).square().sum(-1) / scale**2)


def matern(x: Tensor) -> Tensor:
    r = math.sqrt(3) * torch.cdist(x, C34(x)[:, :2])
    return (1 + r) * torch.exp(-r)


def self_distances(x: Tensor) -> Tensor:
    """The diagonal is zero: a kink, where torch takes the gradient to be zero."""
    return torch.exp(-torch.cdist(x, x).square())


def marginal_likelihood(theta: Tensor) -> Tensor:
    x = C44(theta)
    K = theta[0].exp() * gram(x, x, theta[1].exp()) + (theta[2].exp() + 0.1) * eye(4, theta)
    L = torch.linalg.cholesky(K)
    alpha = torch.cholesky_solve(Y4(theta)[:, None], L)[:, 0]
    return 0.5 * Y4(theta) @ alpha + L.diagonal().log().sum()


def posterior(at: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    K = gram(x, x) + 0.1 * eye(len(x), x)
    weights = torch.linalg.solve(K, gram(x, at))
    return weights.T @ C3(x), 1 - (weights * gram(x, at)).sum(0)


def mean_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    return gram(x, x).mean() + gram(y, y).mean() - 2 * gram(x, y).mean()


A2 = constant(42, 2, 2)


def kalman_step(m: Tensor, P: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    A, identity = A2(m), eye(2, m)
    m, P = A @ m, A @ P @ A.T + 0.1 * identity
    gain = torch.linalg.solve(P + 0.5 * identity, P).T
    rest = identity - gain
    return m + gain @ (z - m), rest @ P @ rest.T + 0.5 * gain @ gain.T


def filter_likelihood(zs: Tensor, log_noise: Tensor) -> Tensor:
    m, P, total = torch.zeros_like(zs[0]), eye(2, zs), torch.zeros_like(log_noise)
    for z in zs:
        m, P = A2(zs) @ m, A2(zs) @ P @ A2(zs).T + 0.1 * eye(2, zs)
        S = P + log_noise.exp() * eye(2, zs)
        residual = z - m
        solved = torch.linalg.solve(S, residual)
        total = total - 0.5 * (residual @ solved + torch.logdet(S))
        m, P = m + P @ solved, P - P @ torch.linalg.inv(S) @ P
    return total


def extended_kalman(m: Tensor) -> Tensor:
    """Linearizes inside."""
    move = lambda x: torch.stack([x[0] + 0.1 * x[1].sin(), x[1] * x[0].cos()])  # noqa: E731
    G = torch.func.jacfwd(move)(m)
    P = G @ G.T + 0.1 * eye(2, m)
    return move(m) + torch.linalg.solve(P + eye(2, m), P) @ (1 - m)


def unscented(m: Tensor, P: Tensor) -> Tensor:
    root = torch.linalg.cholesky(P @ P.T + eye(2, P))
    points = torch.cat([m[None], m + root.T, m - root.T])
    return points.sin().mean(0)


def particle_weights(x: Tensor, z: Tensor) -> Tensor:
    logits = -0.5 * (x.sin() - z).square()
    weights = (logits - logits.logsumexp(0)).exp()
    return weights @ x


add("rbf_gram", gram, (3, 2), (2, 2), **BOTH)
add("matern_by_cdist", matern, (3, 2))
add("cdist", torch.cdist, (3, 2), (2, 2), **BOTH)
add("cdist_to_itself", self_distances, (3, 2))
add("pdist", lambda x: F.pdist(x).reciprocal(), (3, 2))
add(
    "periodic_kernel",
    lambda x, p: torch.exp(-2 * torch.sin(x[:, None] - x) ** 2 / p.exp()),
    (3,),
    (),
    **BOTH,
)
add("marginal_likelihood", marginal_likelihood, (3,))
add("posterior", posterior, (1, 2), (3, 2), **BOTH)
add("mean_discrepancy", mean_discrepancy, (3, 2), (2, 2), **BOTH)
add("kalman_step", kalman_step, (2,), (2, 2), (2,), **ALL3)
add("filter_likelihood", filter_likelihood, (2, 2), (), **BOTH)
add("extended_kalman", extended_kalman, (2,))
add("unscented_points", unscented, (2,), (2, 2), **BOTH)
add("particle_weights", particle_weights, (4,), (), **BOTH)
