"""Each place where torch is silently wrong: that it still is, and that jacfunc is not.

When torch mends one of these, its pin fails: then its entry in ``_faults/`` can
go.
"""

import copy
from contextlib import nullcontext, suppress

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import jacfunc
from tests.kinds.programs import CubePushed, CubeVmapped, OnceDifferentiable
from tests.truth.oracles import looped_hessian, looped_jacobian

W = torch.linspace(-1.0, 1.3, 15, dtype=torch.float64).sin()
X = torch.linspace(-2.0, 1.0, 12, dtype=torch.float64).cos().view(4, 3)
A = torch.linspace(-1.0, 1.0, 48, dtype=torch.float64).sin().view(3, 4, 4) + 3 * torch.eye(4)


def layer_norm(w):
    return F.layer_norm(X @ w[:9].view(3, 3), (3,), w[9:12], w[12:15]).tanh().sum(1)


def batch_norm(w):
    z = X @ w[:9].view(3, 3)
    return F.batch_norm(z, None, None, w[9:12], w[12:15], training=True).tanh().sum(1)


def instance_norm(w):
    z = (X @ w[:9].view(3, 3)).view(2, 2, 3)
    return F.instance_norm(z, weight=w[9:11], bias=w[12:14]).tanh().sum((0, 1))


NORMS = [layer_norm, batch_norm, instance_norm]


@pytest.mark.parametrize("func", NORMS)
@pytest.mark.parametrize("reduce", [False, True], ids=["vector", "scalar"])
def test_hessians_of_normalized_nets(func, reduce):
    def net(w):
        return func(w).sum() if reduce else func(w)

    expected = looped_hessian(net, (W,))
    assert (torch.func.hessian(net)(W) - expected).abs().max() > 1e-3
    for strategy in ("reverse", "forward", "looped", "auto"):
        actual = jacfunc.hessian(net, strategy=strategy)(W)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("func", NORMS)
def test_hessians_of_normalized_nets_inside_vmap(func):
    expected = looped_hessian(func, (W,))
    actual = jacfunc.vmap(jacfunc.hessian(func))(torch.stack([W, W]))
    torch.testing.assert_close(actual, torch.stack([expected, expected]), rtol=1e-9, atol=1e-10)


def test_compiled_hessians_of_scalar_normalized_nets():
    def net(w):
        return layer_norm(w).sum()

    compiled = torch.compile(lambda w: jacfunc.hessian(net)(w), backend="eager", fullgraph=True)
    expected = looped_hessian(net, (W,))
    torch.testing.assert_close(compiled(W), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("func", NORMS)
@pytest.mark.parametrize("outer", [jacfunc.jacfwd, jacfunc.jacrev])
def test_derivatives_of_forward_mode_through_norms(func, outer):
    expected = looped_hessian(func, (W,))
    torch.testing.assert_close(outer(jacfunc.jacfwd(func))(W), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("outer", [jacfunc.jacfwd, jacfunc.jacrev])
def test_derivatives_of_forward_mode_through_lu_factors_are_refused(outer):
    with pytest.raises(NotImplementedError, match=r"forward mode of linalg_slogdet is wrong here"):
        outer(jacfunc.jacfwd(lambda a: torch.linalg.slogdet(a)[1]))(A[0])


def test_training_through_a_forward_jacobian():
    w, a = W.clone().requires_grad_(), A[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(jacfunc.jacfwd(layer_norm)(w).square().sum(), w)
    jac, hess = looped_jacobian(layer_norm, (W,)), looped_hessian(layer_norm, (W,))
    torch.testing.assert_close(gradient, 2 * torch.einsum("oi,oij->j", jac, hess))
    with pytest.raises(NotImplementedError, match="derivatives of it are wrong"):
        jacfunc.jacfwd(torch.logdet)(a)
    expected = looped_jacobian(torch.logdet, (A[0],))
    with torch.no_grad():
        torch.testing.assert_close(jacfunc.jacfwd(torch.logdet)(a), expected)


COLUMNS = {
    "one image": (lambda: torch.nn.Conv2d(32, 2, 16), (1, 32, 16, 16)),
    "images": (lambda: torch.nn.Conv2d(32, 2, 16), (3, 32, 20, 16)),
    "strides": (lambda: torch.nn.Conv2d(20, 2, (17, 14), stride=(2, 3)), (3, 20, 20, 14)),
    "no batch": (lambda: torch.nn.Conv2d(32, 2, 19, bias=False), (32, 19, 19)),
    "transposed": (lambda: torch.nn.ConvTranspose2d(2, 32, 16), (2, 2, 2, 1)),
    "transposed strides": (lambda: torch.nn.ConvTranspose2d(2, 32, 16, 2, 1), (2, 2, 2, 1)),
    "small": (lambda: torch.nn.Conv2d(32, 2, 9), (2, 32, 12, 9)),
}
"""Convolutions to or from one column, whose pullback to the kernel oneDNN does wrong on some CPUs.

No pin can say so of all.
"""


@pytest.mark.parametrize("strategy", ["reverse", "looped", "auto"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_kernels_that_cover_all_columns(kind, strategy):
    make, shape = COLUMNS[kind]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    precise = copy.deepcopy(layer).double()
    y = precise(x.double())
    some = torch.linspace(-1, 1, 3 * y.numel(), dtype=torch.float64).sin().view(3, -1)
    rows = [
        torch.autograd.grad(y.flatten() @ u, precise.weight, retain_graph=True)[0] for u in some
    ]

    def outputs(weight):
        out = torch.func.functional_call(layer, {"weight": weight}, (x,))
        return some.float() @ out.flatten()

    jac = jacfunc.jacobian(outputs, strategy=strategy)
    for _ in range(3):
        result = jac(layer.weight.detach())
        torch.testing.assert_close(result, torch.stack(rows).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3), (1, 3)])
def test_cdist(shape):
    x = torch.linspace(-1.0, 1.0, shape[0] * 3, dtype=torch.float64).sin().view(shape)

    def distances(x):
        return torch.cdist(x, X)

    expected = looped_jacobian(distances, (x,))
    assert (torch.func.jacrev(distances)(x) - expected).abs().max() > 1e-3
    for strategy in ("reverse", "looped", "auto"):
        torch.testing.assert_close(jacfunc.jacobian(distances, strategy=strategy)(x), expected)
    batched = jacfunc.vmap(jacfunc.jacrev(distances))(torch.stack([x, x]))
    torch.testing.assert_close(batched, torch.stack([expected, expected]))
    with pytest.raises(NotImplementedError, match="no forward mode"):
        jacfunc.jacfwd(distances)(x)


LU_SOLVES = {
    "solve": lambda a: torch.linalg.solve(a, torch.ones(4, dtype=a.dtype)),
    "det": torch.linalg.det,
    "method det": lambda a: a.det(),
    "slogdet": lambda a: torch.linalg.slogdet(a)[1],
    "logdet": torch.logdet,
    "tensorsolve": lambda a: torch.linalg.tensorsolve(a, torch.ones(4, dtype=a.dtype)),
}


@pytest.mark.parametrize("name", LU_SOLVES)
def test_forward_mode_of_lu_solves_inside_vmap_is_refused_and_our_vmap_loops(name):
    func = LU_SOLVES[name]
    expected = torch.stack([looped_jacobian(func, (a,)) for a in A])
    assert (torch.func.vmap(torch.func.jacfwd(func))(A) - expected).abs().max() > 1e-3
    with pytest.raises(NotImplementedError, match="misreads memory"):
        torch.func.vmap(jacfunc.jacfwd(func))(A)
    torch.testing.assert_close(jacfunc.vmap(jacfunc.jacfwd(func))(A), expected)
    torch.testing.assert_close(jacfunc.vmap(jacfunc.jacrev(func))(A), expected)
    torch.testing.assert_close(torch.stack([jacfunc.jacfwd(func)(a) for a in A]), expected)


@pytest.mark.parametrize("name", LU_SOLVES)
def test_reverse_mode_of_lu_solves_inside_vmap_without_grad_mode(name):
    """Grad mode off, torch's own backward solves by LU factors and misreads memory."""
    func = LU_SOLVES[name]
    expected = torch.stack([looped_jacobian(func, (a,)) for a in A])
    parameter = A.clone().requires_grad_()
    with torch.no_grad():
        actual = jacfunc.vmap(jacfunc.jacrev(func))(parameter)
    torch.testing.assert_close(actual, expected)
    assert not actual.requires_grad


def test_forward_faults_are_seen_through_traced_graphs():
    """Graphs of make_fx call overloads, and decomposed operations under private names."""
    traced = make_fx(torch.linalg.det)(A[0])
    expected = torch.stack([looped_jacobian(torch.linalg.det, (a,)) for a in A])
    assert (torch.func.vmap(torch.func.jacfwd(traced))(A) - expected).abs().max() > 1e-3
    with pytest.raises(NotImplementedError, match="misreads memory"):
        torch.func.vmap(jacfunc.jacfwd(traced))(A)
    pushed = jacfunc.jacfwd(jacfunc.jacfwd(make_fx(layer_norm)(W)))(W)
    torch.testing.assert_close(pushed, looped_hessian(layer_norm, (W,)), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(jacfunc.vmap(jacfunc.jacrev(traced))(A), expected)


def test_hessians_of_det_inside_vmap():
    expected = torch.stack([looped_hessian(torch.linalg.det, (a,)) for a in A])
    actual = jacfunc.vmap(jacfunc.hessian(torch.linalg.det))(A)
    torch.testing.assert_close(actual, expected)
    by_columns = jacfunc.hessian(torch.linalg.det, strategy="forward")
    with pytest.raises(NotImplementedError, match="misreads memory"):
        torch.func.vmap(by_columns)(A)
    torch.testing.assert_close(jacfunc.vmap(by_columns)(A), expected)


def scatter_prod(x):
    return torch.zeros(2, dtype=x.dtype).scatter_reduce(0, torch.tensor([0, 0, 1]), x, "prod")


def test_forward_mode_of_scatter_prod_is_refused_and_auto_goes_on():
    x = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)

    def wide(x):
        return torch.cat([scatter_prod(x) + 1, x.repeat(20)])

    expected = looped_jacobian(wide, (x,))
    with pytest.raises(NotImplementedError, match="forward derivative is zero"):
        jacfunc.jacfwd(scatter_prod)(x)
    torch.testing.assert_close(jacfunc.jacobian(wide)(x), expected)


def test_forward_mode_of_cholesky_inverse_is_refused():
    lower = torch.linalg.cholesky(A[0] @ A[0].T)
    expected = looped_jacobian(torch.cholesky_inverse, (lower,))
    assert (torch.func.jacfwd(torch.cholesky_inverse)(lower) - expected).abs().max() > 1e-3
    with pytest.raises(NotImplementedError, match="forward formula is wrong"):
        jacfunc.jacfwd(torch.cholesky_inverse)(lower)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")
def test_forward_mode_of_triangular_solve_is_refused():
    b = torch.ones(4, 1, dtype=torch.float64)

    def func(a):
        return torch.triangular_solve(b, a).solution

    expected = looped_jacobian(func, (A[0],))
    assert (torch.func.jacfwd(func)(A[0]) - expected).abs().max() > 1e-3
    with pytest.raises(NotImplementedError, match="triangle that is not read"):
        jacfunc.jacfwd(func)(A[0])


@pytest.mark.parametrize("options", [{"padding_idx": 1}, {"scale_grad_by_freq": True}])
def test_forward_mode_of_an_embedding_with_a_gradient_of_its_own_is_refused(options):
    table = torch.nn.Embedding(3, 2, **options)
    ids = torch.tensor([0, 1, 1])
    jac = jacfunc.module_jacobian(table, strategy="reverse")(ids)["weight"]
    assert (jac[1, :, 1] == (0.5 if "scale_grad_by_freq" in options else 0) * torch.eye(2)).all()
    with pytest.raises(NotImplementedError, match="change its gradient"):
        jacfunc.module_jacobian(table, strategy="forward")(ids)
    plain = torch.nn.Embedding(3, 2)
    jac = jacfunc.module_jacobian(plain, strategy="forward")(ids)["weight"]
    torch.testing.assert_close(jac[1, :, 1], torch.eye(2))


@torch.library.custom_op("jacfunc_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


OPERATOR = torch.ops.jacfunc_tests.cube


@pytest.mark.parametrize("func", [cube, OPERATOR, OPERATOR.default])
def test_custom_operators_have_no_forward_rule(func):
    """The operator itself does not say which of its overloads is called."""
    x = torch.tensor([1.0, 2.0])
    expected = torch.diag(3 * x**2)
    assert torch.equal(torch.func.jacfwd(func)(x), torch.zeros(2, 2))
    for derivative in (jacfunc.jacfwd(func), jacfunc.vmap(jacfunc.jacfwd(func))):
        with pytest.raises(NotImplementedError, match="no forward rule"):
            derivative(x)
    with pytest.raises(NotImplementedError, match="no forward rule"):
        jacfunc.jvp(func, (x,), (x,))
    with pytest.raises(NotImplementedError, match="no forward rule"):
        torch.func.jvp(jacfunc.jacrev(func), (x,), (x,))
    torch.testing.assert_close(jacfunc.jacobian(func)(x), expected)
    torch.testing.assert_close(jacfunc.linearize(func, x)[1] @ torch.ones(2), expected.sum(1))


def test_second_order_through_the_jvp_of_a_custom_function_is_refused():
    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(jacfunc.jacfwd(CubePushed.apply)(x), torch.diag(3 * x * x))
    with pytest.raises(NotImplementedError, match="custom_function_call"):
        jacfunc.jacfwd(jacfunc.jacfwd(CubePushed.apply))(x)


@pytest.mark.parametrize("transform", [jacfunc.jacrev, jacfunc.jacfwd, jacfunc.hessian])
def test_negative_argnums(transform):
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])

    def func(x, y):
        return (x * y**3).sum()

    torch.testing.assert_close(transform(func, argnums=-1)(x, y), transform(func, argnums=1)(x, y))
    assert transform(func, argnums=-1)(x, y).abs().sum() > 1


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped"])
def test_inputs_written_by_the_function_stay_as_they_are(strategy):
    x = torch.tensor([1.0, 2.0])
    jac = jacfunc.jacobian(lambda x: x.mul_(3).sin_(), strategy=strategy)(x)
    torch.testing.assert_close(x, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(jac, torch.diag(3 * torch.cos(3 * x)))


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped"])
def test_dropout_has_one_mask_whatever_the_strategy_and_chunk(strategy):
    x = torch.ones(50)

    def func(x):
        return F.dropout(x, 0.5).repeat(3)

    torch.manual_seed(7)
    expected = torch.diag(F.dropout(x, 0.5)).repeat(3, 1)
    after = torch.get_rng_state()
    for chunk_size in (None, 7) if strategy != "looped" else (None,):
        torch.manual_seed(7)
        jac = jacfunc.jacobian(func, strategy=strategy, chunk_size=chunk_size)(x)
        torch.testing.assert_close(jac, expected)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("strategy", ["reverse", "looped"])
def test_hessians_where_singular_values_coincide(strategy):
    """Reverse over vmapped reverse, torch gives nan at a multiple of the identity."""
    point = 2 * torch.eye(2, dtype=torch.float64)
    assert torch.func.jacrev(torch.func.jacrev(torch.linalg.det))(point).isnan().any()
    actual = jacfunc.hessian(torch.linalg.det, strategy=strategy)(point)
    torch.testing.assert_close(actual, looped_hessian(torch.linalg.det, (point,)))


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped"])
def test_second_order_without_grad_mode(strategy):
    x = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        actual = jacfunc.hessian(lambda x: (x**3).sum(), strategy=strategy)(x)
    torch.testing.assert_close(actual, torch.diag(6 * x))


@pytest.mark.parametrize("transform", [jacfunc.jacrev, jacfunc.jacobian])
def test_inside_plain_forward_mode_the_tangent_comes_through(transform):
    x, tangent = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])
    with forward_ad.dual_level():
        jac = transform(lambda x: x**3)(forward_ad.make_dual(x, tangent))
        primal, pushed = forward_ad.unpack_dual(jac)
    torch.testing.assert_close(primal, torch.diag(3 * x**2))
    torch.testing.assert_close(pushed, torch.diag(6 * x * tangent))


# dynamo, which torch.cond runs, looks at the .grad of what is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_control_flow_operators_in_reverse():
    x = torch.tensor([1.0, 2.0])

    def func(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    for strategy in ("reverse", "looped", "auto"):
        jac = jacfunc.jacobian(func, strategy=strategy)(x)
        torch.testing.assert_close(jac, torch.diag(x.cos()))


# --- wrong however they are swept ---


def test_cross_map_lrn_is_refused():
    norm, x = torch.nn.CrossMapLRN2d(3), torch.rand(1, 4, 2, 2, dtype=torch.float64)
    difference = jacfunc.jacrev(torch.sin)(x)  # the shape alone
    shifted = torch.autograd.functional.jacobian(norm, x)
    step = torch.zeros_like(x)
    step[0, 1, 0, 0] = 1e-6
    slope = (norm(x + step) - norm(x - step)) / 2e-6
    assert shifted.shape == difference.shape
    assert (shifted[..., 0, 1, 0, 0] - slope).abs().max() > 1e-8
    with pytest.raises(NotImplementedError, match="CrossMapLRN2dBackward is wrong here"):
        jacfunc.jacrev(norm)(x)


def test_lu_solve_inside_vmap_is_refused_and_our_vmap_loops():
    def func(a):
        return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), torch.ones(4, 1).to(a))[:, 0]

    expected = torch.stack([looped_jacobian(func, (a,)) for a in A])
    with pytest.raises(NotImplementedError, match="LinalgLuSolveBackward0 is wrong here"):
        torch.func.vmap(jacfunc.jacrev(func))(A)
    torch.testing.assert_close(jacfunc.vmap(jacfunc.jacrev(func))(A), expected)


def test_det_of_a_singular_matrix():
    singular = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    cofactors = torch.tensor([[4.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    (zero,) = torch.autograd.grad(torch.linalg.det(leaf := singular.clone().requires_grad_()), leaf)
    assert (zero - cofactors).abs().max() > 0.5
    torch.testing.assert_close(jacfunc.jacrev(torch.linalg.det)(singular), cofactors)
    with pytest.raises(NotImplementedError, match="det is zero at a singular matrix"):
        jacfunc.jacfwd(torch.linalg.det)(singular)


INDICES = torch.tensor([[0, 1, 1], [0, 1, 0]])
ONCE_RIGHT = {
    "cond": lambda x: torch.cond(
        x.sum() > 0, lambda x: x.sin().sum(), lambda x: x.cos().sum(), (x,)
    ),
    "sparse": lambda x: torch.sparse_coo_tensor(INDICES, x, (2, 2)).to_dense().sin().sum(),
    "once differentiable": lambda x: OnceDifferentiable.apply(x).sum(),
}


@pytest.mark.parametrize("name", ONCE_RIGHT)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_second_derivatives_that_torch_drops_are_refused(name):
    func, x = ONCE_RIGHT[name], torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    torch.testing.assert_close(jacfunc.jacrev(func)(x), looped_jacobian(func, (x,)))
    with pytest.raises(NotImplementedError, match="second derivative through"):
        jacfunc.hessian(func)(x)


def test_forward_mode_stops_where_reverse_mode_is_stopped():
    x = torch.tensor([1.0, 2.0])

    def stopped(x):
        with torch.no_grad():
            scale = x.sum()
        return scale * x

    torch.testing.assert_close(jacfunc.jacrev(stopped)(x), 3 * torch.eye(2))
    assert (torch.func.jacfwd(stopped)(x) - 3 * torch.eye(2)).abs().max() > 0.5
    torch.testing.assert_close(jacfunc.jacfwd(stopped)(x), 3 * torch.eye(2))

    def overwritten(x):
        y = x * 1
        with torch.no_grad():
            y.mul_(2)
        return y

    with pytest.raises(NotImplementedError, match=r"goes on through torch.no_grad\(\), .* mul_"):
        jacfunc.jacfwd(overwritten)(x)

    def hooked(x):
        y = x * 2
        if y.requires_grad:
            y.register_hook(torch.zeros_like)
        return y

    with pytest.raises(NotImplementedError, match="forward mode passes by the hooks of tensors"):
        jacfunc.jacfwd(hooked)(x)


def power(x):
    return x**3


STOPPED = {
    "tuple": lambda x: x.sort().values,
    "list": lambda x: x.split(1)[1],
    "iterated": lambda x: next(iter(x)),
    "power": power,
    "vmap": torch.vmap(power),
    "jvp": lambda x: torch.func.jvp(power, (x,), (torch.ones_like(x),))[1],
    "jacfunc.jvp": lambda x: jacfunc.jvp(power, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_is_computed_under_no_grad_is_a_constant_to_forward_mode(name):
    x = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    scale = STOPPED[name](x)

    def func(x):
        with torch.no_grad():
            scale = STOPPED[name](x)
        return (scale * x).sum()

    def rows(x):
        with torch.no_grad():
            scale = STOPPED[name](x)
        return scale * x

    expected = torch.diag(scale.expand(3))
    pushed = jacfunc.jvp(rows, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(pushed, expected.sum(1))
    torch.testing.assert_close(torch.vmap(jacfunc.jacfwd(rows))(x[None])[0], expected)
    for jacobian in (jacfunc.jacrev, jacfunc.jacfwd):
        torch.testing.assert_close(jacobian(rows)(x), expected)
    zero = torch.zeros(3, 3, dtype=x.dtype)
    for second in (
        jacfunc.jacfwd(jacfunc.jacrev(func)),
        jacfunc.jacfwd(jacfunc.jacfwd(func)),
        jacfunc.jacrev(jacfunc.jacfwd(func)),
        jacfunc.jacfwd(torch.func.grad(func)),
        jacfunc.hessian(func, strategy="forward-over-reverse"),
        jacfunc.hessian(func),
    ):
        torch.testing.assert_close(second(x) + zero, zero)


def nestings(func):
    return (
        jacfunc.jacfwd(jacfunc.jacrev(func)),
        jacfunc.jacfwd(jacfunc.jacfwd(func)),
        jacfunc.jacrev(jacfunc.jacfwd(func)),
        jacfunc.hessian(func, strategy="forward-over-reverse"),
    )


def test_data_are_constants_to_every_transform():
    def func(x):
        return (x.data * x).sum()

    x = torch.tensor([1.0, 2.0])
    assert (torch.func.jacfwd(torch.func.jacrev(func))(x) == torch.eye(2)).all()  # torch's fault
    torch.testing.assert_close(jacfunc.jacfwd(func)(x), x)
    for second in (*nestings(func), jacfunc.hessian(func)):
        for _ in range(2):
            torch.testing.assert_close(second(x) + torch.zeros(2, 2), torch.zeros(2, 2))


def test_what_is_detached_in_place_inside_two_derivatives_is_refused():
    def func(x):
        return ((1 * x).detach_() * x).sum()

    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(jacfunc.jacfwd(func)(x), x)
    torch.testing.assert_close(jacfunc.hessian(func)(x), torch.zeros(2, 2))
    for second in nestings(func):
        with pytest.raises(NotImplementedError, match=r"use detach\(\)"):
            second(x)


def test_a_gradient_that_is_taken_under_no_grad_is_refused_in_forward_mode():
    """Its own graph can't be kept without the tangents."""

    def func(x):
        with torch.no_grad():
            scale = torch.func.grad(lambda x: power(x).sum())(x)
        return scale * x

    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(jacfunc.jacobian(func)(x), torch.diag(3 * x**2))
    with pytest.raises(NotImplementedError, match=r"goes on through torch.no_grad\(\)"):
        jacfunc.jacfwd(func)(x)


def test_an_entry_that_is_set_under_no_grad_is_refused_in_forward_mode():
    def func(x):
        y = torch.zeros(2)
        with torch.no_grad():
            y[:] = x
        return x * y

    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(jacfunc.jacobian(func)(x), torch.diag(x))
    with pytest.raises(NotImplementedError, match=r"goes on through torch.no_grad\(\), .* setitem"):
        jacfunc.jacfwd(func)(x)


def test_backward_hooks_of_modules_are_passed_by_in_forward_mode():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()).double()
    forward, chosen = jacfunc.jacfwd(lambda x: module(x)), jacfunc.jacobian(lambda x: module(x))
    x = torch.rand(2, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(forward(x), chosen(x))
    before = chosen(x)
    module[1].register_full_backward_hook(lambda _, grads, __: (3 * grads[0],))
    torch.testing.assert_close(chosen(x), 3 * before)
    with pytest.raises(NotImplementedError, match="passes by the backward hooks of modules"):
        forward(x)


@pytest.mark.parametrize("name", ["grad_fn", "is_leaf"])
def test_what_a_transform_hides_of_the_graph_is_not_looked_at(name):
    def func(x):
        y = x.sin()
        return y if getattr(y, name) in (None, True) else 2 * y

    x = torch.rand(3, dtype=torch.float64)
    for strategy in ("auto", "reverse"):
        jacobian = jacfunc.jacobian(func, strategy=strategy)(x)
        torch.testing.assert_close(jacobian, 2 * x.cos().diag())
    with pytest.raises(NotImplementedError, match="looks at the graph behind a tensor"):
        jacfunc.jacfwd(func)(x)
    rows = jacfunc.jacrev(jacfunc.vmap(func))(x[None])
    torch.testing.assert_close(rows[0, :, 0], 2 * x.cos().diag())


def test_constants_under_no_grad_may_be_used_in_forward_mode():
    def func(x):
        with torch.no_grad():
            scale = torch.ones(2).sum()
        return scale * x

    torch.testing.assert_close(jacfunc.jacfwd(func)(torch.ones(2)), 2 * torch.eye(2))


def test_embedding_without_its_padding_index_goes_forward():
    weight = torch.rand(4, 2, dtype=torch.float64)

    def func(weight):
        return torch.nn.functional.embedding(torch.tensor([1, 2]), weight, padding_idx=-1)

    torch.testing.assert_close(jacfunc.jacfwd(func)(weight), looped_jacobian(func, (weight,)))


def test_what_vmap_cannot_push_goes_column_by_column(caplog):
    def func(x):
        return x * 3 if x.sum().item() > 0 else x

    x = torch.ones(3)
    torch.testing.assert_close(jacfunc.jacfwd(func)(x), 3 * torch.eye(3))
    noisy = torch.nn.RReLU()
    with caplog.at_level("INFO", "jacfunc"):
        jacfunc.jacfwd(noisy, randomness="same")(x)
    assert "columns go one by one" in caplog.text


def test_what_torch_cannot_do_is_said_with_what_would_work():
    def func(x):
        inner = x.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(inner.square().sum(), inner)
        return grad

    with pytest.raises(
        NotImplementedError, match=r"jacfwd: .*torch can't push .* Let jacobian\(strategy='auto'\)"
    ):
        jacfunc.jacfwd(func)(torch.ones(2))
    assert torch.equal(jacfunc.jacobian(func)(torch.ones(2)), torch.zeros(2, 2))


# --- what leaves no trace in a graph ---

POINT = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
CONSTANT_TO_TORCH = {
    "bessel_j0": torch.special.bessel_j0,
    "chebyshev_polynomial_t": lambda x: torch.special.chebyshev_polynomial_t(x, 2),
    "modified_bessel_i1": torch.ops.aten.special_modified_bessel_i1.default,
}


@pytest.mark.parametrize("transform", [jacfunc.jacrev, jacfunc.jacfwd, jacfunc.hessian])
@pytest.mark.parametrize("name", CONSTANT_TO_TORCH)
def test_functions_that_torch_takes_for_constants_are_refused(name, transform):
    special = CONSTANT_TO_TORCH[name]

    def func(x):
        return (special(x) * x).sum()

    leaf = POINT.clone().requires_grad_()
    assert not special(leaf).requires_grad
    for grad_mode in (True, False):
        with (
            torch.set_grad_enabled(grad_mode),
            pytest.raises(NotImplementedError, match=f"no derivative of {name} and takes it"),
        ):
            transform(func)(POINT)
    with pytest.raises(NotImplementedError, match="takes it for a constant"):
        torch.vmap(transform(func))(POINT[None])


def test_functions_that_torch_takes_for_constants_may_be_of_constants():
    def detached(x):
        return torch.special.bessel_j0(x.detach()) * x

    def stopped(x):
        with torch.no_grad():
            scale = torch.special.bessel_j0(x)
        return scale * x

    expected = torch.diag(torch.special.bessel_j0(POINT))
    for func in (detached, stopped):
        for transform in (jacfunc.jacrev, jacfunc.jacfwd):
            torch.testing.assert_close(transform(func)(POINT), expected)
            torch.testing.assert_close(torch.vmap(transform(func))(POINT[None])[0], expected)


def test_what_an_outer_level_alone_tracks_is_seen_inside():
    def inner(x):
        return jacfunc.jacrev(lambda y: y * torch.special.bessel_j0(x))(torch.ones(3).to(x))

    for outer in (jacfunc.jacrev, jacfunc.jacfwd):
        with pytest.raises(NotImplementedError, match="takes it for a constant"):
            outer(inner)(POINT)


SINCS = {
    "function": torch.sinc,
    "method": lambda x: x.sinc(),
    "in place": lambda x: x.clone().sinc_(),
    "overload": torch.ops.aten.sinc.default,
}


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped"])
@pytest.mark.parametrize("form", SINCS)
def test_second_derivatives_of_sinc_at_zero(form, strategy):
    def func(x):
        return SINCS[form](x).sum()

    zero = torch.zeros(2, dtype=torch.float64)
    assert torch.func.jacrev(torch.func.jacrev(torch.sinc))(zero).isnan().any()
    hess = jacfunc.hessian(func, strategy=strategy)(zero)
    torch.testing.assert_close(hess, -(torch.pi**2) / 3 * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinc_is_that_of_torch_and_its_derivatives_are_smooth(dtype):
    x = torch.linspace(-3.0, 3.0, 601, dtype=dtype)
    _, value = jacfunc.jacrev(lambda x: (torch.sinc(x), torch.sinc(x)), has_aux=True)(x)
    torch.testing.assert_close(value.detach(), torch.sinc(x))
    if dtype == torch.bfloat16:
        return
    u = torch.pi * x.double()
    exact = torch.pi**2 * ((2 - u**2) * u.sin() - 2 * u * u.cos()) / u**3
    second = torch.vmap(jacfunc.hessian(torch.sinc))(x).double()
    away = u.abs() > 0.3  # there the closed form is exact enough itself
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert (second - exact)[away].abs().max() < tolerance
    assert (second[~away] + torch.pi**2 * (1 / 3 - u[~away] ** 2 / 10)).abs().max() < 1e-3


def caught(x):
    try:
        return torch.linalg.cholesky(x).diagonal().log().sum()
    except torch.linalg.LinAlgError:
        return x.square().sum()


def test_errors_that_a_function_catches_for_some_samples():
    points = torch.stack([torch.eye(2), -torch.eye(2)]).double()
    expected = torch.stack([looped_jacobian(caught, (x,)) for x in points])
    assert (torch.vmap(torch.func.jacrev(caught))(points) - expected).abs().max() > 0.5
    for transform in (jacfunc.jacrev, jacfunc.jacfwd):
        with pytest.raises(NotImplementedError, match="goes on after an error that it caught"):
            torch.vmap(transform(caught))(points)
        torch.testing.assert_close(jacfunc.vmap(transform(caught))(points), expected)
        # of a single point the error is the point's own
        torch.testing.assert_close(transform(caught)(points[1]), expected[1])
    torch.testing.assert_close(
        jacfunc.hessian(caught)(points[1]), looped_hessian(caught, (points[1],))
    )


def test_a_refusal_that_a_function_catches_stands():
    def func(x):
        try:
            return torch.special.bessel_j0(x)
        except RuntimeError:
            return x

    with pytest.raises(NotImplementedError, match="takes it for a constant"):
        jacfunc.jacrev(func)(POINT)

    def pushed(x):
        try:
            return torch.cdist(x[:, None], x[:, None]).sum()
        except RuntimeError:
            return x.sum()

    with pytest.raises(NotImplementedError, match="goes on after an error that it caught"):
        jacfunc.jacfwd(pushed)(POINT)


def test_errors_that_leave_a_derivative_inside_a_function_do_not_count():
    def func(x):
        try:
            inner = jacfunc.jacfwd(CubeVmapped.apply)(x)
        except NotImplementedError:
            inner = jacfunc.jacrev(CubeVmapped.apply)(x)
        return inner.sum(0)

    torch.testing.assert_close(jacfunc.jacrev(func)(POINT), torch.diag(6 * POINT))
    torch.testing.assert_close(torch.vmap(jacfunc.jacrev(func))(POINT[None])[0], 6 * POINT.diag())


def test_no_grad_inside_is_seen_without_grad_mode_outside():
    scale = torch.ones(2, requires_grad=True)

    def stopped(x):
        with torch.no_grad():
            constant = x.sum()
        return constant * x * scale

    x = torch.tensor([1.0, 2.0])
    for outside in (torch.no_grad, torch.inference_mode):
        with outside():
            value, pushed = jacfunc.jvp(stopped, (x,), (torch.ones(2),))
            torch.testing.assert_close(jacfunc.jacfwd(stopped)(x), 3 * torch.eye(2))
        assert not value.requires_grad
        assert not pushed.requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_functions_run_while_they_are_watched(fullgraph):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x.sin() * x, backend="eager", fullgraph=fullgraph)
    expected = torch.diag(POINT.cos() * POINT + POINT.sin())
    torch.testing.assert_close(jacfunc.jacrev(compiled)(POINT), expected)
    torch.testing.assert_close(jacfunc.vmap(jacfunc.jacrev(compiled))(POINT[None])[0], expected)


def test_torch_itself_sees_no_graph_in_forward_mode():
    """A flop counter asks tensors for theirs, and would set hooks."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()).double()
    with FlopCounterMode(display=False) as counter:
        jac = jacfunc.jacfwd(net)(POINT)
    torch.testing.assert_close(jac, looped_jacobian(net, (POINT,)))
    assert counter.get_total_flops() > 0


def test_of_torch_script_what_is_traced_goes_forward():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    net.double()

    def derive(module):
        return jacfunc.module_jacobian(module, "inputs", strategy="forward")(POINT)

    traced = torch.jit.trace(net, (POINT,))
    for _ in range(4):
        torch.testing.assert_close(derive(traced), looped_jacobian(net, (POINT,)))
    with pytest.raises(NotImplementedError, match="zero in TorchScript that it has optimized"):
        derive(torch.jit.script(net))
    normed = torch.nn.Sequential(net, torch.nn.LayerNorm(2).double())
    with pytest.raises(NotImplementedError, match="can't be watched through layer_norm"):
        derive(torch.jit.trace(normed, (POINT,)))


@torch.jit.script
def scripted(x):
    return torch.tanh(x) * x.sum()


SECOND = {
    "hessian": jacfunc.hessian,
    "forward over reverse": lambda f: jacfunc.hessian(f, strategy="forward-over-reverse"),
    "of transforms": lambda f: jacfunc.jacfwd(jacfunc.jacrev(f)),
    "of reverse ones": lambda f: jacfunc.jacrev(jacfunc.jacrev(f)),
    "under vmap": lambda f: lambda x: jacfunc.vmap(jacfunc.hessian(f))(x[None])[0],
    "reverse under vmap": lambda f: (
        lambda x: jacfunc.vmap(jacfunc.jacrev(jacfunc.jacrev(f), chunk_size=1))(x[None])[0]
    ),
    "products": lambda f: (
        lambda x: torch.stack(
            [jacfunc.linearize(jacfunc.jacrev(f), x)[1] @ v for v in torch.eye(len(x)).to(x)]
        )
    ),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_of_torch_script_are_right_or_refused(name):
    """Once it is optimized, one level of torch.func knows nothing of what it does at another."""

    def f(x):
        return scripted(x).square().sum()

    for _ in range(4):
        f(POINT.clone().requires_grad_()).backward()
        expected = looped_hessian(f, (POINT,))
        with nullcontext() if name == "hessian" else suppress(NotImplementedError):
            torch.testing.assert_close(SECOND[name](f)(POINT), expected)
