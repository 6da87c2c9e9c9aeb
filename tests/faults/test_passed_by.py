"""What torch's transforms would pass by: hooks, classes, checkpoints, derivatives cut off."""

import pytest
import torch
from torch import nn
from torch.autograd import functional
from torch.fx.immutable_collections import immutable_dict
from torch.utils.checkpoint import checkpoint

import jacfunc
from tests.lending.test_lent import Again

D = torch.float64
X = torch.linspace(-1.0, 1.2, 12, dtype=D).sin().view(4, 3)
POINT = torch.tensor([0.3, 0.5, 0.7], dtype=D)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(D)


def rows_of_samples(module, x):
    """Row by row and sample by sample, as autograd gives them, through the hooks of parameters."""
    names, params = zip(*module.named_parameters(), strict=True)
    samples = [module(x[b : b + 1])[0] for b in range(len(x))]
    rows = [
        [torch.autograd.grad(out, params, retain_graph=True) for out in some] for some in samples
    ]
    return {
        name: torch.stack([torch.stack([row[i] for row in some]) for some in rows])
        for i, name in enumerate(names)
    }


# --- hooks of parameters ---

MASK = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=D)[:, None]
HOOKS = {
    "mask": lambda g: g * MASK,
    "scale": lambda g: 3 * g,
    "look": lambda g: None,
    "clip": lambda g: g.clamp(-0.1, 0.1),
    "norm": lambda g: g / (1 + g.square().sum()),
}


@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_parameters_see_the_rows_of_each_sample(name, strategy):
    module = net()
    of_samples = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)
    of_samples(X)
    handle = module[0].weight.register_hook(HOOKS[name])
    expected = rows_of_samples(module, X)
    for key, block in of_samples(X).items():
        torch.testing.assert_close(block, expected[key])
    whole = jacfunc.module_jacobian(module, strategy=strategy)(X[:1])
    for key, block in whole.items():
        torch.testing.assert_close(block[0], expected[key][0])
    handle.remove()
    expected = rows_of_samples(module, X)
    for key, block in of_samples(X).items():
        torch.testing.assert_close(block, expected[key])


def test_forward_refuses_hooks_of_parameters_which_factors_go_round():
    module = net()
    module[2].bias.register_hook(lambda g: 2 * g)
    with pytest.raises(NotImplementedError, match=r"module_jacobian: .* hook"):
        jacfunc.module_jacobian(module, per_sample=True, strategy="forward")(X)
    expected = rows_of_samples(module, X)
    for key, block in jacfunc.module_jacobian(module, per_sample=True, strategy="structured")(
        X
    ).items():
        torch.testing.assert_close(block, expected[key])
    rows = torch.cat([block.flatten(2) for block in expected.values()], -1)
    kernel = jacfunc.ntk(module, dict(module.named_parameters()), X)
    torch.testing.assert_close(kernel, torch.einsum("aip,bjp->abij", rows, rows))
    with pytest.raises(NotImplementedError, match="parameters must have no hooks"):
        jacfunc.module_jacobian(module, create_graph=True)(X)
    # what is not differentiated may have some
    inputs = jacfunc.module_jacobian(module, "inputs", strategy="forward")(X[0])
    torch.testing.assert_close(inputs, jacfunc.jacrev(module)(X[0]))


def doubling(x):
    """Gradients count twice, as far as they come through the first sine."""
    hidden = x.sin()
    if hidden.requires_grad:
        hidden.register_hook(lambda g: 2 * g)
    return hidden.sin()


TWICE = {
    "hessian": jacfunc.hessian(lambda x: doubling(x).sum()),
    "laplacian": jacfunc.laplacian(lambda x: doubling(x).sum()),
    "jacrev": jacfunc.jacrev(jacfunc.jacrev(doubling)),
    "hvp": lambda x: jacfunc.hvp(lambda x: doubling(x).sum(), (x,), (torch.ones_like(x),))[1][0],
}


@pytest.mark.parametrize("name", TWICE)
def test_hooks_of_tensors_count_in_both_derivatives_or_not_at_all(name):
    hidden, slope = POINT.sin(), POINT.cos()
    first = 2 * hidden.cos() * slope
    second = -4 * hidden.sin() * slope**2 - 2 * hidden.cos() * hidden  # the hook acts once more
    bend = TWICE[name]
    torch.testing.assert_close(bend(POINT).sum(), second.sum())
    torch.testing.assert_close(jacfunc.vmap(bend)(POINT[None]).sum(), second.sum())
    with pytest.raises(NotImplementedError, match="passes by hooks of tensors"):
        torch.vmap(bend)(POINT[None])
    for outer in (jacfunc.vmap, torch.vmap):
        jac = outer(jacfunc.jacobian(doubling))(POINT[None])[0]
        torch.testing.assert_close(jac, first.diag())


# --- classes of tensors ---


class Doubled(torch.Tensor):
    """Products with it count twice."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(torch.Tensor) if func is torch.Tensor.mul else result


class Plain(torch.Tensor):
    """Does nothing of its own."""


def squared(x):
    return x.mul(x)


def test_classes_of_tensors_are_differentiated_as_what_they_are():
    point = POINT.as_subclass(Doubled)
    jac = jacfunc.jacrev(squared)(point).as_subclass(torch.Tensor)
    torch.testing.assert_close(jac, (4 * POINT).diag())
    for transform in (jacfunc.jacrev, jacfunc.jacfwd):
        jac = transform(squared)(POINT.as_subclass(Plain)).as_subclass(torch.Tensor)
        torch.testing.assert_close(jac, (2 * POINT).diag())


PASSED_BY = {
    "jvp": lambda point: jacfunc.jvp(squared, (point,), (torch.ones(3, dtype=D),)),
    "jacfwd": lambda point: jacfunc.jacfwd(squared)(point),
    "inside a transform": lambda point: torch.func.jacrev(
        lambda x: jacfunc.jacrev(lambda y: squared(y) * x)(point)
    )(POINT),
}


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = nn.Parameter(gate)

    def forward(self, x):
        return x.mul(self.gate)


@pytest.mark.parametrize("name", PASSED_BY)
def test_classes_of_tensors_that_a_transform_passes_by_are_refused(name):
    with pytest.raises(NotImplementedError, match="pass by the __torch_function__ of Doubled"):
        PASSED_BY[name](POINT.as_subclass(Doubled))


def test_classes_of_tensors_are_right_for_each_sample():
    x, gate = POINT[:, None], POINT
    of_gate = jacfunc.module_jacobian(
        Gated(gate.as_subclass(Doubled)), per_sample=True, strategy="structured"
    )(x)
    expected = torch.eye(3, dtype=D) * 2 * x[:, :, None]
    torch.testing.assert_close(of_gate["gate"].as_subclass(torch.Tensor), expected)
    of_inputs = jacfunc.module_jacobian(Gated(gate), "inputs", per_sample=True, strategy="reverse")(
        x.as_subclass(Doubled)
    )
    expected = (2 * gate)[None, :, None].expand(3, 3, 1)
    torch.testing.assert_close(of_inputs.as_subclass(torch.Tensor), expected)


class Shifted(torch.Tensor):
    """Products of matrices with it are another function: what they return is plain."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func not in (nn.functional.linear, torch.matmul):
            return result
        return (2 * result.as_subclass(torch.Tensor) + 1).cos()


class Named(torch.Tensor):
    """What was made of it remembers that, and has another sine."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.cos() if func is torch.sin else result


@pytest.mark.parametrize("kind", [Shifted, Named])
def test_constants_of_such_classes_are_what_they_are(kind):
    """In whatever rules do with an operation, at first and once calls are settled."""
    matrix = X.as_subclass(kind)

    def func(x):
        return torch.sin(torch.matmul(matrix, x)).as_subclass(torch.Tensor)

    def gradients(out, x):
        return torch.stack([torch.autograd.grad(y, x, create_graph=True)[0] for y in out])

    point = POINT.clone().requires_grad_()
    jac = gradients(func(point), point)
    bend = torch.stack([gradients(row, point).trace() for row in jac]).detach()
    jac = jac.detach()
    doors = (
        (jacfunc.jacobian(func), jac),
        (jacfunc.gram(func), jac @ jac.T),
        (jacfunc.laplacian(func), bend),
        (lambda x: jacfunc.vmap(jacfunc.laplacian(func))(x[None])[0], bend),
    )
    for door, expected in doors:
        for _ in range(20):
            torch.testing.assert_close(door(POINT), expected)


def test_products_at_parameters_of_such_classes():
    """The first product is pushed, and learns what later ones are told."""
    model = net()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Shifted))
    samples = rows_of_samples(model, X).values()
    rows = torch.cat([x.as_subclass(torch.Tensor).flatten(2) for x in samples], 2)
    expected = 2 / 8 * torch.einsum("bmp,bmq->p", rows, rows)
    loss = nn.MSELoss()
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    product = jacfunc.ggn(model, loss)
    for _ in range(20):
        found = product(X, torch.zeros(4, 2, dtype=D)) @ v
        flat = torch.cat([x.as_subclass(torch.Tensor).flatten() for x in found.values()])
        torch.testing.assert_close(flat, expected)


# --- reentrant checkpoints ---


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4).to(D), nn.Linear(4, 2).to(D)

    def forward(self, x):
        if self.asks and not x.requires_grad:
            x.requires_grad_()
        return self.outer(checkpoint(self.inner, x, use_reentrant=True).tanh())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped", "structured"])
@pytest.mark.parametrize("asks", [True, False])
def test_reentrant_checkpoints_of_modules_are_refused(asks, strategy):
    module = Checkpointed()
    module.asks = asks
    for options in ({"per_sample": True}, {"per_sample": True, "select": "inner.*"}, {}):
        with pytest.raises(NotImplementedError, match="module_jacobian: "):
            jacfunc.module_jacobian(module, strategy=strategy, **options)(X)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("transform", [jacfunc.jacrev, jacfunc.jacobian, jacfunc.hessian])
@pytest.mark.parametrize("closes_over", [True, False])
def test_reentrant_checkpoints_of_functions_are_refused(closes_over, transform):
    def func(w):
        args = (POINT,) if closes_over else (w,)
        return checkpoint(lambda x: (x * w).sin(), *args, use_reentrant=True).sum()

    with pytest.raises(NotImplementedError, match="checkpoints must not be reentrant"):
        transform(func)(POINT)


# --- derivatives that a function takes itself ---


def cube(x):
    return x**3


CUT_OFF = {
    "jacobian": lambda x: functional.jacobian(cube, x).sum(0),
    "vectorized": lambda x: functional.jacobian(cube, x, vectorize=True).sum(0),
    "hessian": lambda x: functional.hessian(lambda y: cube(y).sum(), x).sum(0),
    "vjp": lambda x: functional.vjp(cube, x, POINT)[1],
    "jvp": lambda x: functional.jvp(cube, x, POINT)[1] * x,
    "hvp": lambda x: functional.hvp(lambda y: cube(y).sum(), x, POINT)[1] + x,
    "vhp": lambda x: functional.vhp(lambda y: cube(y).sum(), x, POINT)[1],
    "of what is closed over": lambda x: functional.vjp(lambda y: y**2 * x, POINT, POINT)[1] + x,
    "grad": lambda x: torch.autograd.grad(cube(x).sum(), x)[0],
}


@pytest.mark.parametrize("name", CUT_OFF)
@pytest.mark.parametrize("transform", [jacfunc.jacrev, jacfunc.jacobian])
def test_derivatives_that_keep_no_graph_are_refused(name, transform):
    with pytest.raises(NotImplementedError, match="keeps no graph, which would count as a const"):
        transform(CUT_OFF[name])(POINT)


OF_AGAIN = {
    "cotangents are constants": lambda x: Again.apply(cube, x).sum(),
    "cotangents depend on the point": lambda x: Again.apply(cube, x).square().sum(),
    "beside what has a graph": lambda x: (Again.apply(cube, x) + x).square().sum(),
}
SECOND = {
    "hessian": jacfunc.hessian,
    "hvp": lambda f: lambda x: jacfunc.hvp(f, (x,), (x,)),
    "hessian_operator": lambda f: lambda x: jacfunc.hessian_operator(f, x)[1] @ x,
    "of jacrev": lambda f: jacfunc.jacrev(jacfunc.jacrev(f)),
    "laplacian": jacfunc.laplacian,
}


@pytest.mark.parametrize("name", OF_AGAIN)
@pytest.mark.parametrize("second", SECOND)
def test_second_derivatives_through_backward_passes_that_keep_no_graph_are_refused(second, name):
    func = OF_AGAIN[name]
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"^[a-z_]+: the function must be one"):
            SECOND[second](func)(POINT)
    plain = func(POINT.clone().requires_grad_())
    assert plain.requires_grad
    slope = jacfunc.jacrev(func)(POINT)  # the first derivative is right
    step = 1e-6 * torch.eye(len(POINT), dtype=POINT.dtype)
    beside = [(func(POINT + h) - func(POINT - h)) / 2e-6 for h in step]
    torch.testing.assert_close(slope, torch.stack(beside), rtol=1e-6, atol=1e-6)


def test_derivatives_inside_may_keep_their_graph_or_be_of_constants():
    def kept(x):
        return functional.jacobian(cube, x, create_graph=True).sum(0)

    def of_constants(x):
        return functional.jacobian(cube, x.detach()).sum(0) * x

    def beside(x):
        with torch.no_grad():
            constant = functional.vjp(cube, x.detach(), POINT)[1]
        (slope,) = torch.autograd.grad(cube(x).sum(), x, retain_graph=True)
        return (constant + slope.detach()) * x

    torch.testing.assert_close(jacfunc.jacrev(kept)(POINT), torch.diag(6 * POINT))
    torch.testing.assert_close(jacfunc.jacrev(of_constants)(POINT), torch.diag(3 * POINT**2))
    expected = torch.diag(3 * POINT**3 + 3 * POINT**2)
    torch.testing.assert_close(jacfunc.jacrev(beside)(POINT), expected)


# --- what is right, and was refused ---


class Exp(torch.autograd.Function):
    """Keeps its output."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent):
        return ctx.saved_tensors[0] * tangent


def test_reverse_over_the_jvp_of_a_custom_function():
    def pushed(x):
        return jacfunc.jvp(Exp.apply, (x,), (torch.ones_like(x),))[1]

    exact = POINT.exp()
    torch.testing.assert_close(jacfunc.jacrev(pushed)(POINT), exact.diag())
    torch.testing.assert_close(torch.func.grad(lambda x: pushed(x).sum())(POINT), exact)
    torch.testing.assert_close(torch.vmap(jacfunc.jacrev(pushed))(POINT[:, None])[:, 0, 0], exact)
    leaf = POINT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(jacfunc.jacfwd(Exp.apply)(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, exact)
    with pytest.raises(NotImplementedError, match="custom_function_call is wrong here"):
        jacfunc.jacfwd(jacfunc.jacrev(pushed))(POINT)


class OnceExp(Exp):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


ONCE = {
    "once differentiable": (OnceExp.apply, torch.exp),
    "weight norm": (
        lambda x: torch._weight_norm_interface(x[None], torch.ones(1, 1).to(x), 0)[0][0],
        lambda x: x / x.norm(),
    ),
}


@pytest.mark.parametrize("strategy", ["reverse", "looped"])
@pytest.mark.parametrize("name", ONCE)
def test_a_first_derivative_may_be_taken_where_no_second_one_can(name, strategy):
    func, alike = ONCE[name]
    scale = torch.tensor(2.0, dtype=D, requires_grad=True)
    jac = jacfunc.jacobian(lambda x: scale * func(x), strategy=strategy)(POINT)
    expected = 2 * torch.func.jacrev(alike)(POINT)
    torch.testing.assert_close(jac.detach(), expected)
    with pytest.raises(NotImplementedError, match="must not be differentiated where torch has no"):
        jac.sum().backward()
    assert scale.grad is None


@pytest.mark.parametrize("level", [lambda f: f, torch.vmap, jacfunc.vmap])
def test_second_derivatives_of_what_is_once_differentiable_are_refused_in_transforms(level):
    def total(x):
        return OnceExp.apply(x).sum()

    points = POINT if level not in (torch.vmap, jacfunc.vmap) else POINT[None]
    for second in (
        jacfunc.hessian(total, strategy="reverse"),
        jacfunc.hessian(total, strategy="forward"),
        jacfunc.jacrev(jacfunc.jacrev(total)),
        torch.func.grad(lambda x: jacfunc.jacrev(total)(x).sum()),
    ):
        with pytest.raises(NotImplementedError, match="second derivative through"):
            level(second)(points)
    # its pushforward may be pulled back
    actual = level(jacfunc.hessian(total))(points)
    torch.testing.assert_close(actual.view(3, 3), torch.diag(POINT.exp()))


def test_a_first_derivative_of_what_is_once_differentiable_in_vmap():
    leaf = POINT.clone().requires_grad_()
    jac = torch.vmap(jacfunc.jacrev(OnceExp.apply))(leaf[None])[0]
    torch.testing.assert_close(jac.detach(), POINT.exp().diag())
    with pytest.raises(NotImplementedError, match="must not be differentiated where torch has no"):
        jac.sum().backward()


@pytest.mark.parametrize("transform", [jacfunc.jacrev, jacfunc.jacfwd])
def test_immutable_dicts_are_trees(transform):
    tree = immutable_dict({"b": POINT, "a": 2 * POINT})
    jac = transform(lambda tree: tree["a"] * tree["b"])(tree)
    assert list(jac) == ["b", "a"]
    torch.testing.assert_close(jac["a"], POINT.diag())
    out = transform(lambda x: immutable_dict({"y": x**2}))(POINT)
    torch.testing.assert_close(out["y"], (2 * POINT).diag())


@pytest.mark.parametrize("nothing", [(), {}, {"a": None}])
def test_forward_mode_of_nothing(nothing):
    assert jacfunc.jacfwd(lambda x: nothing)(POINT) == nothing
    assert jacfunc.jvp(lambda x: nothing, (POINT,), (POINT,)) == (nothing, nothing)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_forward_mode_of_writes_into_what_is_not_differentiated(chunk_size):
    def func(x, y, *, z):
        y.copy_(x)
        z.mul_(x)
        return y * z

    y, z = torch.ones(3, dtype=D), torch.full((3,), 2.0, dtype=D)
    jac = jacfunc.jacfwd(func, chunk_size=chunk_size)(POINT, y, z=z)
    torch.testing.assert_close(jac, (4 * POINT).diag())


def test_a_write_into_what_is_closed_over_is_no_missing_rule():
    kept = torch.zeros(3, dtype=D)
    with pytest.raises(NotImplementedError, match=r"jacfwd: .* in-place operation"):
        jacfunc.jacfwd(lambda x: kept.copy_(x) * 2)(POINT)


def test_torch_asks_for_no_graph_in_reverse_inside_forward():
    """A multi-head attention asks its tensors whether they require gradients."""
    asked = []

    def func(x):
        def inner(y):
            asked.append(y.detach().requires_grad)
            return y**2 * x

        return jacfunc.jacrev(inner)(POINT).diagonal()

    expected = torch.diag(2 * POINT)
    torch.testing.assert_close(jacfunc.jacfwd(func)(POINT), expected)
    assert not any(asked)
