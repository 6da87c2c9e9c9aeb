"""What mypy knows of results, in a user's script: it must pass under ``--strict``."""

from collections.abc import Callable, Iterator
from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc.estimators import Approximation, Hutchinson, Lanczos, StochasticLanczos, XDiag, XTrace
from jacfunc.operators import (
    ConjugateGradient,
    HessianOperator,
    diagonal,
    frobenius_norm,
    logdet,
    spectral_norm,
    trace,
)

A, x = torch.ones(2, 2), torch.ones(2)
model, batch, labels = nn.Linear(2, 3), torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
Params = dict[str, Tensor]
params: Params = {"weight": A, "bias": x}


def vector(x: Tensor) -> Tensor:
    return torch.tanh(A @ x)


def scaled(x: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * x


def number(x: Tensor) -> Tensor:
    return x.sin().sum()


def predict(params: Params, x: Tensor) -> Tensor:
    return params["weight"] @ x + params["bias"]


def predict_batch(params: Params, x: Tensor) -> Tensor:
    return x @ params["weight"].T + params["bias"]


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x.cos()


def named(x: Tensor) -> tuple[Tensor, str]:
    return x.sin(), "any object"


def named_number(x: Tensor) -> tuple[Tensor, str]:
    return x.sin().sum(), "any object"


# --- a tensor of a tensor ---

assert_type(jacfunc.jacrev(vector)(x), Tensor)
assert_type(jacfunc.jacfwd(vector)(x), Tensor)
assert_type(jacfunc.jacobian(vector, strategy="forward", chunk_size=2)(x), Tensor)
assert_type(jacfunc.jacrev(scaled)(x, scale=2.0), Tensor)
assert_type(jacfunc.jacrev(torch.sin)(x), Tensor)
assert_type(jacfunc.hessian(number)(x), Tensor)
assert_type(jacfunc.laplacian(vector)(x), Tensor)
assert_type(jacfunc.vmap(jacfunc.laplacian(number))(A), Tensor)
assert_type(jacfunc.hessian_diagonal(vector, chunk_size=1)(x), Tensor)
assert_type(jacfunc.divergence(vector)(x), Tensor)
assert_type(jacfunc.value_jacobian_laplacian(number)(x), tuple[Tensor, Tensor, Tensor])
assert_type(jacfunc.jacrev(jacfunc.jacrev(vector))(x), Tensor)
assert_type(jacfunc.vmap(jacfunc.jacrev(vector))(A), Tensor)
assert_type(jacfunc.value_and_jacobian(vector)(x), tuple[Tensor, Tensor])

# --- a tensor of a tree: the tree of the input ---

assert_type(jacfunc.jacrev(predict)(params, x), Params)
assert_type(jacfunc.value_and_jacobian(predict)(params, x), tuple[Tensor, Params])

# --- products ---

assert_type(jacfunc.jvp(vector, (x,), (x,)), tuple[Tensor, Tensor])
assert_type(jacfunc.jvp(pair, (x,), (x,))[1], tuple[Tensor, Tensor])
assert_type(jacfunc.jvp(named, (x,), (x,), has_aux=True), tuple[Tensor, Tensor, str])
value, pullback = jacfunc.vjp(vector, x)
assert_type(value, Tensor)
assert_type(pullback(value), tuple[Tensor])
both, pullback_of_both = jacfunc.vjp(predict, params, x)
assert_type(both, Tensor)
assert_type(jacfunc.vjp(named, x, has_aux=True)[2], str)
assert_type(jacfunc.vmap(pair)(A), tuple[Tensor, Tensor])
assert_type(jacfunc.gram(vector)(x), Tensor)

# --- of a graph that is there ---

losses: Tensor = model(batch).square().mean(0)
assert_type(jacfunc.graph_jacobian(losses, model.weight, retain_graph=True), Tensor)
by_name, in_a_row = dict(model.named_parameters()), list(model.parameters())
assert_type(jacfunc.graph_jacobian(losses, by_name, retain_graph=True), Params)
assert_type(jacfunc.graph_jacobian(losses, in_a_row, retain_graph=True), list[Tensor])
assert_type(jacfunc.graph_jacobian([losses], in_a_row, flat=True), Tensor)

# --- modules ---

assert_type(jacfunc.module_jacobian(model, flat=True), Callable[..., Tensor])
assert_type(jacfunc.module_jacobian(model, per_sample=True, flat=True)(batch), Tensor)
assert_type(jacfunc.module_jacobian(model, full_output=True)(batch), jacfunc.ModuleResult)
assert_type(jacfunc.module_jacobian(model, outputs=[0, -1], flat=True)(batch), Tensor)
assert_type(jacfunc.TopK(2).indices(model(batch)), Tensor)
rows = jacfunc.stream_jacobian(model, "rows", outputs=slice(0, 2), per_sample=True)(batch)
assert_type(rows, Iterator[tuple[slice, dict[str, Tensor]]])
assert_type(jacfunc.ntk(model, None, batch, outputs=labels[:, None]), Any)
squares = jacfunc.ggn(model, None, outputs={"logits": A})(batch)
assert_type(squares, jacfunc.GaussNewton[Params])
drawn = jacfunc.fisher(model, "categorical", outputs=jacfunc.Sampled(2, seed=1))(batch)
assert_type(drawn.diagonal(), Params)
assert_type(jacfunc.module_jacobian(model, full_output=True)(batch).buffers, Params)
blocks = jacfunc.stream_jacobian(model)(batch)
assert_type(blocks, Iterator[tuple[str, Any]])
rows = jacfunc.stream_jacobian(model, "rows")(batch)
assert_type(rows, Iterator[tuple[slice, Params]])
assert_type(jacfunc.param_slices(model), dict[str, slice])

# --- kernels and curvature ---

assert_type(jacfunc.ntk(predict, params, A), Tensor)
assert_type(jacfunc.ntk(predict_batch, params, A, batched=True), Tensor)
G = jacfunc.ggn(model, F.cross_entropy)(batch, labels)
assert_type(G @ dict(model.named_parameters()), Params)
assert_type(G @ torch.ones(G.shape[1]), Tensor)
assert_type(G @ G, jacfunc.operators.LinearOperator)
assert_type(G.diagonal(), Params)
assert_type(G.matrix(), Tensor)
of_params = jacfunc.ggn(predict_batch, F.mse_loss)(params, A, A)
assert_type(of_params.diagonal(), Params)
assert_type(jacfunc.gradient_norms(model, F.cross_entropy)(batch, labels), Tensor)
assert_type(jacfunc.random_projection(model, 8, F.cross_entropy)(batch, labels), Tensor)
sided: Params = jacfunc.random_projection(model, per_module=(4, 4))(batch)

# --- operators ---

value, J = jacfunc.linearize(vector, x)
assert_type(value, Tensor)
assert_type(J, jacfunc.LinearOperator)
assert_type(J.T @ J, Any)
assert_type((2.0 * J - J).matrix(), Tensor)
assert_type(jacfunc.linearize(named, x, has_aux=True), tuple[Tensor, jacfunc.LinearOperator, str])
assert_type(jacfunc.module_operator(model)(batch), jacfunc.LinearOperator)
step: Tensor = J.lstsq(value, damping=1e-3, center=True)
solution: Tensor = J.solve(x, damping=1e-3, side="rows", solver=ConjugateGradient(rtol=1e-6))
assert_type(J.inverse(damping=0.1, side="columns"), jacfunc.LinearOperator)
assert_type(J.gram(center=True, dtype=torch.float64), Tensor)
assert_type(J.quad(x, per_sample=True), Tensor)

# --- second order ---

assert_type(jacfunc.hessian(number, rows=[0])(x), Tensor)
assert_type(jacfunc.hvp(number, (x,), (x,)), tuple[Tensor, tuple[Tensor]])
assert_type(jacfunc.hvp(named_number, (x,), (x,), has_aux=True)[2], str)
value, H = jacfunc.hessian_operator(number, x)
assert_type(H, HessianOperator)
assert_type(H.T, HessianOperator)
assert_type(H[[0], [1]].matrix(), Tensor)
assert_type(jacfunc.module_hessian(model, F.cross_entropy)(batch, labels), HessianOperator)
# --- reductions of operators ---

assert_type(trace(J), Tensor)
assert_type(trace(J, XTrace(4)), Approximation)
assert_type(frobenius_norm(J, Hutchinson(4, seed=1)), Approximation)
assert_type(spectral_norm(J), Tensor)
assert_type(spectral_norm(J, Lanczos()), Approximation)
assert_type(logdet(J.T @ J, damping=0.1), Tensor)
assert_type(logdet(J.T @ J, StochasticLanczos(), damping=0.1), Approximation)
assert_type(diagonal(J), Any)
assert_type(diagonal(J, XDiag(4)), Approximation)

# --- compiled: called as what was compiled is ---

compiled = jacfunc.compile(jacfunc.jacrev(vector))
assert_type(compiled(x), Tensor)
assert_type(compiled.compilations[0].calls_to_repay, float)
assert_type(compiled.compilations[0].peak_bytes, int | None)
planned = jacfunc.compile(jacfunc.plan(vector, x))
assert_type(planned, jacfunc.Plan)
assert_type(jacfunc.explain(vector, x, strategy=planned).compilation, jacfunc.Compilation | None)

# --- costs ---

assert_type(jacfunc.estimate(vector, x), jacfunc.Estimate)
assert_type(jacfunc.plan(vector, x).forecast is None, bool)
assert_type(jacfunc.explain(vector, x).peak_bytes, int)

# --- what depends on values, or on what mypy cannot see, is any tree ---

assert_type(jacfunc.jacrev(pair)(x), Any)
assert_type(jacfunc.jacrev(predict, 1)(params, x), Any)
assert_type(jacfunc.jacrev(lambda p: p["a"].sin())({"a": x}), Any)
assert_type(jacfunc.vmap(lambda x: x.sin())(A), Any)
assert_type(jacfunc.jacobian(model)(x), Any)
assert_type(jacfunc.module_jacobian(model)(batch), Any)
assert_type(jacfunc.ntk(model, None, batch), Any)
