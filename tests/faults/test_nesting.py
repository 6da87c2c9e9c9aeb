"""Kernels that torch differentiates wrongly, in every nesting of transforms: right, or refused.

Each entry is a kernel and the same map in elementary operations, whose derivatives are looped over
in float64. A nesting names transforms from the outermost to the innermost, ours and torch's mixed.
"""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import jacfunc
from tests.kinds.programs import CubeVmapped

FLOAT = torch.float64
MATRIX = torch.linspace(-1.0, 1.5, 12, dtype=FLOAT).cos().view(3, 4)
ONES = torch.ones(2, dtype=FLOAT)
SHAPED = torch.eye(2, dtype=FLOAT) * 3
POINT = torch.tensor([0.7, -0.4, 0.9, 0.2], dtype=FLOAT)
SHIFTS = torch.tensor([[0.1, 0.3, -0.2, 0.4], [-0.3, 0.2, 0.1, 0.2]], dtype=FLOAT)
GROUPS = torch.tensor([0, 0, 1, 1])


def normalized(x, dims):
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()


def images(x):
    return (MATRIX * x).sin().view(1, 2, 6)


def square(x):
    return x.reshape(2, 2) + SHAPED


def determinant(a):
    return a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]


def inverse(a):
    adjugate = torch.stack([a[1, 1], -a[0, 1], -a[1, 0], a[0, 0]]).view(2, 2)
    return adjugate / determinant(a)


def products(x):
    return torch.stack([(1 + x[0]) * x[0] * x[1], (1 + x[0]) * x[2] * x[3]])


MENDED = {
    "layer norm": (
        lambda x: F.layer_norm((MATRIX * x).sin(), (4,), x, x.cos()),
        lambda x: normalized((MATRIX * x).sin(), -1) * x + x.cos(),
    ),
    "layer norm of torch": (
        lambda x: torch.layer_norm(x.sin(), (4,)),
        lambda x: normalized(x.sin(), -1),
    ),
    "native layer norm": (
        lambda x: torch.ops.aten.native_layer_norm(x.sin(), (4,), None, None, 1e-5)[0],
        lambda x: normalized(x.sin(), -1),
    ),
    "batch norm": (
        lambda x: F.batch_norm((MATRIX * x).sin(), None, None, x, x.cos(), training=True),
        lambda x: normalized((MATRIX * x).sin(), 0) * x + x.cos(),
    ),
    "batch norm of one image": (
        lambda x: torch.batch_norm(images(x), x[:2], None, None, None, True, 0.1, 1e-5, False),
        lambda x: normalized(images(x), (0, 2)) * x[:2, None],
    ),
    "batch norm with known statistics": (
        lambda x: F.batch_norm((MATRIX * x).sin(), POINT, POINT.square(), x),
        lambda x: ((MATRIX * x).sin() - POINT) / (POINT.square() + 1e-5).sqrt() * x,
    ),
    "instance norm": (
        lambda x: F.instance_norm(images(x), weight=x[:2], bias=x[2:]),
        lambda x: normalized(images(x), 2) * x[:2, None] + x[2:, None],
    ),
    "group norm": (
        lambda x: F.group_norm(images(x), 1),
        lambda x: normalized(images(x), (1, 2)),
    ),
    "rms norm": (
        lambda x: F.rms_norm(x.sin(), (4,), x, 1e-5),
        lambda x: x.sin() / (x.sin().square().mean() + 1e-5).sqrt() * x,
    ),
}
GUARDED = {
    "weight norm": (
        lambda x: torch._weight_norm(x.view(2, 2).sin(), x[:2, None], 0),
        lambda x: (v := x.view(2, 2).sin()) * x[:2, None] / v.square().sum(1, True).sqrt(),
    ),
    "det": (lambda x: torch.linalg.det(square(x)), lambda x: determinant(square(x))),
    "logdet": (lambda x: square(x).logdet(), lambda x: determinant(square(x)).log()),
    "solve": (
        lambda x: torch.linalg.solve(square(x), ONES),
        lambda x: inverse(square(x)) @ ONES,
    ),
    "lu solve": (
        lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(square(x)), ONES[:, None]),
        lambda x: inverse(square(x)) @ ONES,
    ),
    "cholesky inverse": (
        lambda x: torch.cholesky_inverse(square(x).tril()),
        lambda x: inverse(square(x).tril() @ square(x).tril().T),
    ),
    "cdist": (
        lambda x: torch.cdist(x.view(2, 2), MATRIX[:, :2]),
        lambda x: (x.view(2, 1, 2) - MATRIX[:, :2]).square().sum(-1).sqrt(),
    ),
    "products by scatter": (
        lambda x: (x[0] + ONES).scatter_reduce(0, GROUPS, x, "prod"),
        products,
    ),
    "strided scatter": (
        lambda x: torch.as_strided_scatter(x.square(), x[:2] ** 3, (2,), (3,)),
        lambda x: torch.stack([x[0] ** 3, x[1] ** 2, x[2] ** 2, x[1] ** 3]),
    ),
    "eigenvalues": (
        lambda x: torch.linalg.eigvalsh(square(x) + square(x).T).square().sum(),
        lambda x: (square(x) + square(x).T).square().sum(),
    ),
    "custom function": (CubeVmapped.apply, lambda x: x**3),
}
ENTRIES = MENDED | GUARDED


def rows(func):
    def pulled(x, shift):
        value, pull = jacfunc.vjp(lambda x: func(x, shift), x)
        basis = torch.eye(value.numel(), dtype=FLOAT).view(-1, *value.shape)
        return torch.stack([pull(seed)[0] for seed in basis]).view(*value.shape, 4)

    return pulled


def columns(func):
    def pushed(x, shift):
        basis = torch.eye(4, dtype=FLOAT)
        return torch.stack(
            [jacfunc.jvp(lambda x: func(x, shift), (x,), (seed,))[1] for seed in basis], -1
        )

    return pushed


TRANSFORMS = {
    "jacrev": jacfunc.jacrev,
    "jacfwd": jacfunc.jacfwd,
    "jacobian": jacfunc.jacobian,
    "hessian": jacfunc.hessian,
    "vjp": rows,
    "jvp": columns,
    "torch.jacrev": torch.func.jacrev,
    "torch.jacfwd": torch.func.jacfwd,
    "torch.hessian": torch.func.hessian,
}
NESTINGS = [
    "jacrev",
    "jacfwd",
    "hessian",
    "jacrev-jacrev",
    "jacrev-jacfwd",
    "jacfwd-jacfwd",
    "jacobian-jacobian",
    "vjp-jvp",
    "jvp-vjp",
    "jacrev-hessian",
    "jacfwd-hessian",
    "hessian-jacfwd",
    "jacrev-jacfwd-jacrev",
    "vmap-jacrev",
    "vmap-hessian",
    "vmap-jacrev-jacfwd",
    "jacrev-vmap-jacrev",
    "jacfwd-vmap-jacrev",
    "jacrev-vmap-jacfwd",
    "jacrev-vmap-hessian",
    "jacrev-torch.vmap-jacrev",
    "jacrev-torch.vmap-torch.jacrev",
    "jacrev-torch.jacrev",
    "jacrev-torch.jacfwd",
    "jacfwd-torch.jacrev",
    "jacfwd-torch.jacfwd",
    "torch.jacrev-jacrev",
    "torch.jacrev-jacfwd",
    "torch.jacfwd-jacrev",
    "torch.jacfwd-jacfwd",
    "jacrev-torch.hessian",
    "torch.jacrev-hessian",
    "vmap-torch.jacfwd",
    "vmap-torch.hessian",
    "torch.vmap-jacfwd",
    "torch.vmap-hessian",
    "torch.jacrev-vmap-jacrev",
    "jacrev-vmap-torch.jacfwd",
]


def order(nesting):
    return sum(2 if "hessian" in name else 1 for name in nesting.split("-") if "vmap" not in name)


def two_numbers(func):
    """Rows of two outputs are pulled at once, those of one are not."""

    def reduced(x, shift):
        value = func(x + shift).flatten()
        scale = torch.linspace(0.5, 1.5, value.numel(), dtype=FLOAT)
        return torch.stack([(scale * value.sin()).sum(), (value * value / scale).mean()])

    return reduced


def by_nesting(nesting, func):
    """At the point and the first shift; summed over shifts, where a vmap is inside."""
    *outside, inside = nesting.split("-")
    found = TRANSFORMS[inside](func)
    for name in reversed(outside):
        if "vmap" in name:
            mapped = (torch if "torch" in name else jacfunc).vmap(found, (None, 0))
            found = lambda x, shift, mapped=mapped: mapped(x, SHIFTS).sum(0)  # noqa: E731
        else:
            found = TRANSFORMS[name](found)
    return found(POINT, SHIFTS[0])


def looped(func, times):
    """Derivatives of derivatives ``[*out, *in, *in, ...]`` by plain loops."""

    def at(shift):
        x = POINT.clone().requires_grad_()
        value = func(x, shift)
        for _ in range(times):
            each = [
                torch.autograd.grad(v, x, create_graph=True, allow_unused=True)[0]
                if v.requires_grad
                else None
                for v in value.flatten()
            ]
            stacked = torch.stack([torch.zeros_like(x) if g is None else g for g in each])
            value = stacked.view(*value.shape, 4)
        return value.detach()

    return at


@pytest.fixture(scope="module")
def expected():
    known = {}

    def of(name, nesting):
        key = name, order(nesting)
        if key not in known:
            at = looped(two_numbers(ENTRIES[name][1]), key[1])
            known[key] = torch.stack([at(shift) for shift in SHIFTS])
        return known[key].sum(0) if "vmap" in nesting else known[key][0]

    return of


@pytest.mark.parametrize("name", MENDED)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_kernels_with_a_formula_are_right(name, nesting, expected):
    actual = by_nesting(nesting, two_numbers(ENTRIES[name][0]))
    torch.testing.assert_close(actual, expected(name, nesting), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_other_kernels_are_right_or_refused(name, nesting, expected):
    try:
        actual = by_nesting(nesting, two_numbers(ENTRIES[name][0]))
    except NotImplementedError:
        return
    except RuntimeError as error:  # where all that is swept by vmap is torch's own
        if "vmap:" not in str(error):
            raise
        return
    torch.testing.assert_close(actual, expected(name, nesting), rtol=1e-8, atol=1e-8)


# --- what is done with a result later, and calls that come one after the other ---


def norm_net(x):
    return two_numbers(ENTRIES["layer norm"][0])(x, SHIFTS[0])


def plain_net(x):
    return two_numbers(ENTRIES["layer norm"][1])(x, SHIFTS[0])


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped"])
def test_gradients_of_results_at_points_that_require_grad(strategy):
    """How often a result is differentiated, nobody knows when it is made."""
    third = looped(lambda x, shift: plain_net(x), 3)(SHIFTS[0])
    x = POINT.clone().requires_grad_()
    for later, transform in enumerate((jacfunc.hessian, jacfunc.jacobian), 1):
        found = transform(norm_net, strategy=strategy)(x)
        for _ in range(later):
            (found,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        torch.testing.assert_close(found, third.sum((0, 1, 2)), rtol=1e-8, atol=1e-8)


def test_gradients_of_results_through_what_a_function_closes_over():
    def of(scale, net):
        return lambda x: net(x * scale)

    scale = torch.tensor(1.3, dtype=FLOAT, requires_grad=True)
    hess = jacfunc.hessian(of(scale, norm_net))(POINT)
    (actual,) = torch.autograd.grad(hess.square().sum(), scale)

    def squares(scale):
        return looped(lambda x, shift: of(scale, plain_net)(x), 2)(SHIFTS[0]).square().sum()

    step = 1e-5
    slope = (squares(scale.detach() + step) - squares(scale.detach() - step)) / (2 * step)
    torch.testing.assert_close(actual, slope, rtol=1e-6, atol=1e-6)


def test_a_kernel_that_met_nothing_at_first_is_watched_at_higher_orders():
    func = norm_net
    third = looped(lambda x, shift: plain_net(x), 3)(SHIFTS[0])
    for _ in range(2):
        jacfunc.jacrev(func)(POINT)
        jacfunc.hessian(func)(POINT)
        actual = jacfunc.jacrev(jacfunc.hessian(func))(POINT)
        torch.testing.assert_close(actual, third, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("strategy", ["reverse", "looped", "forward", "structured", "auto"])
def test_penalties_of_jacobians_per_sample(strategy):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    params = list(net.parameters())
    jacobian = jacfunc.module_jacobian(net, per_sample=True, strategy=strategy)
    jacobian(MATRIX)  # what met nothing then is not what is asked for now
    kept = jacfunc.module_jacobian(net, per_sample=True, create_graph=True, strategy=strategy)
    penalty = sum(block.square().sum() for block in kept(MATRIX).values())
    wanted = 0.0
    for output in net(MATRIX).flatten():
        gradients = torch.autograd.grad(output, params, create_graph=True)
        wanted = wanted + sum(gradient.square().sum() for gradient in gradients)
    for actual, expected in zip(
        torch.autograd.grad(penalty, params, allow_unused=True),
        torch.autograd.grad(wanted, params, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_formulas_leave_values_and_running_statistics_as_torch_has_them(training, dtype):
    x = MATRIX.to(dtype)
    norm = torch.nn.BatchNorm1d(4, dtype=dtype).train(training)
    for buffer in (norm.running_mean, norm.running_var):
        buffer.add_(0.3)
    seen, kept = [], [norm.running_mean.clone(), norm.running_var.clone()]

    def func(x):
        mean, variance = (buffer.clone() for buffer in kept)
        value = F.batch_norm(x, mean, variance, training=training)
        seen[:] = [value.detach(), mean.detach(), variance.detach()]
        return value.float().sum()

    jacfunc.jacrev(jacfunc.jacrev(jacfunc.jacrev(func)))(x)
    mean, variance = (buffer.clone() for buffer in kept)
    value = F.batch_norm(x, mean, variance, training=training)
    for actual, expected in zip(seen, (value, mean, variance), strict=True):
        torch.testing.assert_close(actual, expected)


def test_third_derivatives_through_traced_graphs():
    traced = make_fx(norm_net)(POINT)
    actual = jacfunc.jacrev(jacfunc.hessian(traced))(POINT)
    third = looped(lambda x, shift: plain_net(x), 3)(SHIFTS[0])
    torch.testing.assert_close(actual, third, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("transform", [jacfunc.jacrev, jacfunc.jacfwd])
def test_calls_that_torch_refuses_stay_refused(transform):
    def func(x):
        return F.layer_norm(x, (3,)).sum()

    with pytest.raises((RuntimeError, NotImplementedError), match="normalized_shape"):
        jacfunc.hessian(transform(func))(POINT)


def test_the_pullback_of_a_strided_scatter_is_wrong_at_once():
    base, source = torch.ones(4, requires_grad=True), torch.ones(2, requires_grad=True)
    scattered = torch.as_strided_scatter(base * 1, source, (2,), (3,))
    (gradient,) = torch.autograd.grad(scattered.sum(), base)
    assert gradient.tolist() == [1, 0, 0, 1]
    with pytest.raises(NotImplementedError, match="backward pass of as_strided_scatter is wrong"):
        jacfunc.jacrev(lambda base: torch.as_strided_scatter(base, source, (2,), (3,)))(base)


RUNNING = {
    "sum of exponentials": (
        lambda x: x.logcumsumexp(0),
        lambda x: torch.stack([x[: n + 1].exp().sum().log() for n in range(len(x))]),
    ),
    "sum of exponentials of torch": (
        lambda x: torch.logcumsumexp(x[None] * torch.ones(2, 1, dtype=x.dtype), -1),
        lambda x: torch.stack([x[: n + 1].exp().sum().log() for n in range(len(x))]).expand(2, -1),
    ),
    "product": (
        lambda x: torch.cumprod(x, dim=0),
        lambda x: torch.stack([x[: n + 1].prod() for n in range(len(x))]),
    ),
}


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("point", [[0.0, 2.0, 0.5], [2.0, 0.0, 0.0], [0.3, -1.2, 0.7]])
def test_running_sums_and_products_at_zero(name, point):
    """Where a cotangent of the sum, or an entry of the product, is zero."""
    kernel, plain = RUNNING[name]
    x = torch.tensor(point, dtype=FLOAT)

    def of(running):
        return lambda x: running(x).square().sum() + running(x).sum()

    expected = torch.autograd.functional.hessian(of(plain), x)
    func = of(kernel)
    for second in (
        jacfunc.hessian(func),
        jacfunc.hessian(func, strategy="forward-over-reverse"),
        jacfunc.hessian(func, strategy="reverse-over-reverse"),
        jacfunc.jacrev(jacfunc.jacfwd(func)),
        jacfunc.jacfwd(jacfunc.jacfwd(func)),
        lambda x: jacfunc.hessian_operator(func, x)[1].matrix(),
    ):
        torch.testing.assert_close(second(x), expected)
    torch.testing.assert_close(jacfunc.laplacian(func)(x), expected.trace())
    rows = torch.vmap(jacfunc.hessian(func))(torch.stack([x, x + 1]))
    torch.testing.assert_close(rows[0], expected)


def test_running_sums_whose_terms_vanish():
    x = torch.tensor([-900.0, 0.0, 1.0], dtype=FLOAT)
    found = jacfunc.hessian(lambda x: x.logcumsumexp(0)[1:].square().sum())(x)
    expected = torch.autograd.functional.hessian(
        lambda x: sum(x[: n + 1].logsumexp(0).square() for n in (1, 2)), x
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", RUNNING)
def test_running_sums_and_products_that_are_compiled(name):
    second = jacfunc.jacfwd(jacfunc.jacfwd(lambda x: RUNNING[name][0](x).square().sum()))
    compiled = jacfunc.compile(second, backend="replay")
    for x in (POINT, torch.tensor([0.0, 2.0, 0.0, 0.5], dtype=FLOAT)):
        torch.testing.assert_close(compiled(x), second(x))
