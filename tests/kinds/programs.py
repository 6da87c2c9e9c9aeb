"""Functions that reach into torch: custom derivatives, hooks, inner derivatives, trees, dtypes."""

from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from optree.dataclasses import dataclass as optree_dataclass
from torch import Tensor
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import jacfunc
from tests.kinds.functions import C3, C33, FunctionKind, family
from tests.kinds.problems import Args, values

PROGRAM_KINDS: list[FunctionKind] = []

# --- custom functions ---

add = family("Custom functions and operators", PROGRAM_KINDS)


class OldCube(torch.autograd.Function):
    """Forward and context in one: functorch refuses this style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * cotangent


class OldReverse(torch.autograd.Function):
    """The context is kept as a plain attribute, and the gradient is not that of the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * cotangent, None


class Cube(torch.autograd.Function):
    """The new style, without anything for vmap or forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * cotangent


class CubeVmapped(Cube):
    generate_vmap_rule = True


class CubePushed(CubeVmapped):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * tangent


class CubeByHand(Cube):
    """A vmap rule of its own."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return CubeByHand.apply(x), in_dims[0]


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.exp() * cotangent


class SortWithRanks(torch.autograd.Function):
    """An integer output beside, marked as not differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> Tensor:
        (ranks,) = ctx.saved_tensors
        return torch.zeros_like(cotangent).scatter(0, ranks, cotangent)


class NumpySine(torch.autograd.Function):
    """Leaves torch and comes back, as wrappers of simulators do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().cpu().numpy())).to(x.device)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return NumpyCosine.apply(x) * cotangent


class NumpyCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.cos(x.detach().cpu().numpy())).to(x.device)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -NumpySine.apply(x) * cotangent


class NumpySineVmapped(torch.autograd.Function):
    """The same in the new style, with a rule for vmap: numpy takes any shape."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.from_numpy(np.sin(x.detach().cpu().numpy())).to(x.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.cos() * cotangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return NumpySineVmapped.apply(x), in_dims[0]


class PartlyUsed(torch.autograd.Function):
    """Gradients only for what needs them, None for the rest, cotangents that may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        return x * y * scale, y.sin()

    @staticmethod
    def backward(ctx: Any, first: Any, second: Any) -> tuple[Any, Any, None]:
        x, y = ctx.saved_tensors
        by_x = by_y = None
        if first is not None and ctx.needs_input_grad[0]:
            by_x = first * y * ctx.scale
        if ctx.needs_input_grad[1]:
            by_y = first * x * ctx.scale if first is not None else torch.zeros_like(y)
            by_y = by_y if second is None else by_y + second * y.cos()
        return by_x, by_y, None


@torch.library.custom_op("jacfunc_coverage::cube", mutates_args=())
def cube_op(x: Tensor) -> Tensor:
    return x**3


@cube_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("jacfunc_coverage::cube_vmapped", mutates_args=())
def cube_vmapped_op(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("jacfunc_coverage::sine", mutates_args=())
def sine_op(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(x.cpu().numpy())).to(x.device)


def keep_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def cube_backward(ctx: Any, cotangent: Tensor) -> Tensor:
    return 3 * ctx.saved_tensors[0] ** 2 * cotangent


def sine_backward(ctx: Any, cotangent: Tensor) -> Tensor:
    return ctx.saved_tensors[0].cos() * cotangent


cube_op.register_autograd(cube_backward, setup_context=keep_input)
cube_vmapped_op.register_autograd(cube_backward, setup_context=keep_input)
cube_vmapped_op.register_vmap(lambda info, in_dims, x: (cube_vmapped_op(x), in_dims[0]))
sine_op.register_autograd(sine_backward, setup_context=keep_input)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    for _ in range(2):
        x = x.sin() * 2
    return x


add("old_style", OldCube.apply, (3,))
add("old_style_in_a_net", lambda x: (C33(x) @ OldCube.apply(x.tanh())).square().sum(), (3,))
add(
    "gradient_reversal",
    lambda x: OldReverse.apply(x.sin(), 0.5),
    (3,),
    unsure="the derivative is meant to be another",
)
add("setup_context", Cube.apply, (3,))
add("generated_vmap_rule", CubeVmapped.apply, (3,))
add("vmap_rule_by_hand", CubeByHand.apply, (3,))
add("with_jvp", CubePushed.apply, (3,))
add("once_differentiable", OnceDifferentiable.apply, (3,))
add("integer_output_beside", SortWithRanks.apply, (3,))
add("numpy_inside", lambda x: NumpySine.apply(x) * x, (3,))
add("numpy_with_vmap_rule", lambda x: NumpySineVmapped.apply(x) * x, (3,))
add(
    "partly_used_gradients", lambda x, y: PartlyUsed.apply(x, y, 2.0)[0], (2,), (2,), argnums=(0, 1)
)
add("unmaterialized_gradients", lambda x, y: PartlyUsed.apply(x, y, 2.0), (2,), (2,), argnums=1)
add(
    "numpy_constant",
    lambda x: x * torch.from_numpy(np.tanh(x.detach().cpu().numpy())).to(x),
    (3,),
    unsure="a factor is held constant",
)
add("custom_op", cube_op, (3,))
add("custom_op_in_a_net", lambda x: (C33(x) @ cube_op(x.tanh())).square().sum(), (3,))
add("custom_op_with_vmap", cube_vmapped_op, (3,))
add("custom_op_in_numpy", lambda x: sine_op(x) * x, (3,))
add("scripted", scripted, (3,))

# --- graphs ---

add = family("Checkpoints, hooks, graph surgery", PROGRAM_KINDS)


def packed(x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return (x.sin() * x).exp()


def saved_on_cpu(x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return x.tanh() * x


def hooked(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda cotangent: 0.5 * cotangent)
    return y * 3


def partly_constant(x: Tensor) -> Tensor:
    with torch.no_grad():
        weights = x.softmax(0)
    return weights * x + x.detach() * 2


def in_segments(x: Tensor) -> Tensor:
    layers = [torch.sin, lambda y: C33(y) @ y, torch.tanh, torch.exp]
    return checkpoint_sequential(layers, 2, x, use_reentrant=False)


def checkpointed_block(x: Tensor) -> Tensor:
    return checkpoint(lambda y: (C33(y) @ y).sin() * y, x, use_reentrant=False)


add("checkpoint_of_block", checkpointed_block, (3,))
add(
    "checkpoint_of_two",
    lambda x, y: checkpoint(torch.mul, x.sin(), y, use_reentrant=False) + x,
    (3,),
    (3,),
    argnums=(0, 1),
)
add("checkpoint_sequential", in_segments, (3,))
add(
    "checkpoint_nested",
    lambda x: checkpoint(checkpointed_block, x, use_reentrant=False).cos(),
    (3,),
)
add("saved_tensors_hooks", packed, (3,))
add("save_on_cpu", saved_on_cpu, (3,))
add("tensor_hook", hooked, (3,), unsure="the hook changes the gradient")
add("no_grad_and_detach", partly_constant, (3,), unsure="a part is held constant")
add("enable_grad_inside", torch.enable_grad()(lambda x: x.sin() * x), (3,))

# --- inner derivatives ---

add = family("Derivatives inside", PROGRAM_KINDS)


def energy(q: Tensor) -> Tensor:
    return (q.square().sum() * 0.5 + (q[0] * q[1]).cos()).exp()


def autograd_force(x: Tensor) -> Tensor:
    """As force fields do it: the gradient is taken inside, its graph kept."""
    if not x.requires_grad:
        x = x.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(energy(x), x, create_graph=True)
    return -gradient


def autograd_of_copy(x: Tensor) -> Tensor:
    """Constant to the outside: the inner point is detached."""
    inner = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(energy(inner), inner)
    return gradient * x


def laplacian(x: Tensor) -> Tensor:
    return torch.func.hessian(energy)(x).diagonal().sum()


def accelerations(q: Tensor, v: Tensor) -> Tensor:
    """Of a Lagrangian: M⁻¹ (∂L/∂q − ∂²L/∂v∂q v)."""

    def lagrangian(q: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (v * v * (2 + q.sin())).sum() - energy(q)

    force = torch.func.grad(lagrangian)(q, v)
    mass = torch.func.hessian(lagrangian, 1)(q, v)
    mixed = torch.func.jacrev(torch.func.grad(lagrangian, 1), 0)(q, v)
    return torch.linalg.solve(mass, force - mixed @ v)


def adapted(w: Tensor) -> Tensor:
    """One inner gradient step, then the loss of the outer task."""
    inner = torch.func.grad(lambda w: ((C33(w) @ w).sin() - 1).square().mean())(w)
    return (C33(w).T @ (w - 0.1 * inner)).square().mean()


NET = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def functional_mlp(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(NET, params, (x,))


def mlp_params(device: str, dtype: torch.dtype) -> Args:
    shapes = {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (1, 3), "2.bias": (1,)}
    params = {
        name: values(k, *shape, device=device, dtype=dtype)
        for k, (name, shape) in enumerate(shapes.items())
    }
    return params, values(9, 2, device=device, dtype=dtype)


def ensemble(weights: Tensor) -> Tensor:
    return torch.vmap(lambda w: torch.tanh(w @ C3(w)))(weights)


add("inner_autograd_grad", autograd_force, (2,))
add("inner_autograd_grad_of_copy", autograd_of_copy, (2,), unsure="a part is held constant")
add("inner_grad", lambda x: torch.func.grad(energy)(x) * x, (2,))
add("inner_jvp", lambda x, v: torch.func.jvp(energy, (x,), (v,))[1], (2,), (2,), argnums=(0, 1))
add("inner_vjp", lambda x: torch.func.vjp(torch.tanh, x)[1](x)[0], (3,))
add("inner_vmap", ensemble, (2, 3))
add("inner_jacrev", lambda x: torch.func.jacrev(lambda y: C33(y) @ y.sin())(x).det(), (3,))
add("inner_jacfwd", lambda x: torch.func.jacfwd(lambda y: C33(y) @ y.sin())(x).square(), (3,))
add(
    "inner_jacfunc_jacobian", lambda x: jacfunc.jacobian(lambda y: C33(y) @ y.sin())(x).sum(1), (3,)
)
add("inner_jacfunc_vmap", lambda x: jacfunc.vmap(torch.sin)(x).prod(0), (2, 2))
add(
    "inner_autograd_functional",
    lambda x: torch.autograd.functional.jacobian(torch.sin, x, create_graph=True) @ x,
    (2,),
)
add("laplacian", laplacian, (2,))
add("lagrangian", accelerations, (2,), (2,), argnums=(0, 1))
add("meta_learning_step", adapted, (3,))
add("functional_call", functional_mlp, make=mlp_params)
add("functional_call_by_input", functional_mlp, make=mlp_params, argnums=1)

# --- trees ---

add = family("Trees in and out", PROGRAM_KINDS)


class Pair(NamedTuple):
    first: Any
    second: Any


Point = namedtuple("Point", "x y z")


@optree_dataclass(namespace="jacfunc")
class Body:
    position: Any
    velocity: Any
    name: Any


def in_dict(device: str, dtype: torch.dtype) -> Args:
    # keys that are not sorted
    return (
        {
            "w": values(1, 2, 3, device=device, dtype=dtype),
            "b": values(2, 2, device=device, dtype=dtype),
            "a": values(3, 3, device=device, dtype=dtype),
        },
    )


def in_tree(kind: Callable[..., Any], count: int = 2) -> Callable[[str, torch.dtype], Args]:
    return lambda device, dtype: (
        kind(*(values(k, 2, device=device, dtype=dtype) for k in range(1, count + 1))),
    )


def dense(tree: dict[str, Tensor]) -> Tensor:
    return torch.tanh(tree["w"] @ tree["a"] + tree["b"])


def nested(tree: Any) -> Any:
    x, (y, extra) = tree["layers"]
    return {"z": [x * y, extra["k"].exp()], "a": (x.sum(),)}


def nested_point(device: str, dtype: torch.dtype) -> Args:
    x, y, k = in_tree(lambda *leaves: leaves, 3)(device, dtype)[0]
    return ({"layers": [x, (y, {"k": k})], "a": x + y},)


def moved(body: Any) -> Any:
    return type(body)(body.position + 0.1 * body.velocity, -body.position.sin(), body.name)


def with_constants(device: str, dtype: torch.dtype) -> Args:
    x = values(1, 3, device=device, dtype=dtype)
    return ({"x": x, "index": torch.tensor([2, 0], device=device), "none": None, "act": "tanh"},)


add("dict_in", dense, make=in_dict)
add("dict_out", lambda x: {"sine": x.sin(), "a": x.sum()}, (3,))
add("dict_in_and_out", lambda t: {"y": dense(t), "b": t["b"] ** 2}, make=in_dict)
add("list_in", lambda xs: xs[0] * xs[1].sin(), make=in_tree(lambda *xs: list(xs)))
add("tuple_out", lambda x: (x.sin(), x[:1] ** 2), (3,))
add("list_out", lambda x: [x.sin(), [x.sum()]], (2,))
add(
    "generator_of_layers",
    lambda xs: sum(x.sin() * k for k, x in enumerate(xs)),
    make=in_tree(lambda *xs: list(xs), 3),
)
add("nested", nested, make=nested_point)
add("named_tuple", lambda p: Pair(p.first * p.second, p.first.sin()), make=in_tree(Pair))
add("namedtuple_factory", lambda p: Point(p.x * p.y, p.z, p.x.sin()), make=in_tree(Point, 3))
add(
    "ordered_dict",
    lambda t: OrderedDict(z=t["z"] * t["a"], a=t["a"].sin()),
    make=in_tree(lambda z, a: OrderedDict(z=z, a=a)),
)
add("dataclass", moved, make=in_tree(lambda p, v: Body(p, v, None)))
add("dataclass_with_a_name", moved, make=in_tree(lambda p, v: Body(p, v, "moon")))
add("constants_beside", lambda t: getattr(torch, t["act"])(t["x"])[t["index"]], make=with_constants)
add("none_in_output", lambda x: (x.sin(), None), (3,))
add("integers_in_output", lambda x: {"y": x * 2, "k": x.argmax(), "mask": x > 0}, (3,))
add(
    "empty_container", lambda t: t["x"].sin(), make=in_tree(lambda x, y: {"x": x, "y": y, "no": []})
)
add("topk_pair", lambda x: torch.topk(x.square(), 2), (4,))
add(
    "module_parameters",
    lambda t, x: (t["w"] @ x).sin() + t["b"],
    make=lambda device, dtype: (*in_dict(device, dtype), values(5, 3, device=device, dtype=dtype)),
    argnums=(0, 1),
)

# --- dtypes and shapes ---

add = family("Dtypes, shapes, strides", PROGRAM_KINDS)


def two_precisions(device: str, dtype: torch.dtype) -> Args:
    return (
        values(1, 2, device=device, dtype=dtype),
        values(2, 2, device=device, dtype=torch.float32),
    )


def laid_out(change: Callable[[Tensor], Tensor], *shape: int) -> Callable[[str, torch.dtype], Args]:
    return lambda device, dtype: (change(values(1, *shape, device=device, dtype=dtype)),)


ROUNDED = {"unsure": "rounding drowns finite differences", "rtol": 1e-4}

add(
    "mixed_precision",
    lambda x, y: (x * y, y.sum()),
    make=two_precisions,
    argnums=(0, 1),
    **ROUNDED,
)
add("to_float32_inside", lambda x: x.float().sin() * 2, (3,), **ROUNDED)
add("float32_and_back", lambda x: x.float().exp().double() * x, (3,), **ROUNDED)
add(
    "bfloat16_inside",
    lambda x: (x.bfloat16() * 2).double() * x,
    (3,),
    unsure=ROUNDED["unsure"],
    rtol=2e-2,
)
add(
    "integer_beside",
    lambda x, n: x**n,
    make=lambda device, dtype: (
        values(1, 3, device=device, dtype=dtype),
        torch.tensor([2, 3, 1], device=device),
    ),
)
add(
    "integer_first",
    lambda i, x: x[i] * x.sum(),
    argnums=1,
    make=lambda device, dtype: (
        torch.tensor([2, 0], device=device),
        values(1, 3, device=device, dtype=dtype),
    ),
)
add(
    "float_beside",
    lambda x, scale: x.sin() * scale,
    make=lambda device, dtype: (values(1, 3, device=device, dtype=dtype), 2.5),
)
add("scalar", lambda x: x**3 * x.exp(), ())
add("scalar_to_matrix", lambda x: torch.stack([x.cos(), -x.sin(), x.sin(), x.cos()]).view(2, 2), ())
add("to_scalar", lambda x: (x @ x).sqrt(), (3,))
add("one_entry", lambda x: x.sin() * x, (1, 1, 1))
add("four_dimensional", lambda x: x.sin().transpose(0, 3).sum(1), (1, 2, 1, 2))
add("empty_input", lambda x: x.sum() + torch.ones(2, dtype=x.dtype, device=x.device), (0,))
add("empty_output", lambda x: x[:0] * 2, (3,))
add("empty_rows", lambda x: x @ x.T, (0, 2))
add("empty_leaf_beside", lambda x, y: torch.cat([x.sin(), y]), (2,), (0,), argnums=(0, 1))
add("constant_output", lambda x: torch.ones(2, dtype=x.dtype, device=x.device), (3,))
add("unused_argument", lambda x, y: x * 2, (3,), (2,), argnums=(0, 1))
add("identity", lambda x: x, (3,))
add("view_of_input", lambda x: x.view(2, 2).T, (4,))
add("expanded_input", lambda x: x.square() @ x.T, make=laid_out(lambda x: x.expand(2, 3), 3))
add("transposed_input", lambda x: x.sin() @ x.T, make=laid_out(lambda x: x.T, 3, 2))
add("strided_input", lambda x: x.cumsum(0) * x, make=laid_out(lambda x: x[::2], 6))
add(
    "channels_last",
    lambda x: x.square().sum(1),
    make=laid_out(lambda x: x.contiguous(memory_format=torch.channels_last), 1, 2, 2, 2),
)
add("requires_grad_input", lambda x: x.sin(), make=laid_out(lambda x: x.requires_grad_(), 3))
add("parameter_input", lambda x: x.sin() * x, make=laid_out(torch.nn.Parameter, 3))
add("tensor_of_python_floats", lambda x: torch.tensor([1.0, 2.0, 3.0]).to(x) * x, (3,))
add("numpy_scalar_factor", lambda x: x * np.float64(1.5) + np.pi, (3,))

# --- arguments ---

add = family("Arguments, aux, callables", PROGRAM_KINDS)


def scaled(x: Tensor, y: Tensor, *, power: int = 1, shift: Any = 0.0) -> Tensor:
    return x**power * y + shift


class Polynomial:
    """A callable object, and a method of one."""

    def __init__(self, *coefficients: float) -> None:
        self.coefficients = coefficients

    def __call__(self, x: Tensor) -> Tensor:
        return sum(c * x**k for k, c in enumerate(self.coefficients))

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * self(x)


def spread(*xs: Tensor) -> Tensor:
    return torch.stack(xs).prod(0)


def logged(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    y = x.sin()
    return y * x, {"y": y, "index": y.argmax()}


add("second_argument", scaled, (2,), (2,), argnums=1)
add("negative_argument", lambda x, y: x * y**2, (3,), (3,), argnums=-1)
add("negative_and_positive", lambda x, y, z: x * y**2 + z.sum(), (2,), (2,), (3,), argnums=(-1, 0))
add("tuple_of_one", scaled, (2,), (2,), argnums=(1,))
add("arguments_in_another_order", lambda x, y: x[:, None] * y.sin(), (2,), (3,), argnums=(1, 0))
add("keyword_constants", scaled, (2,), (2,), kwargs={"power": 3, "shift": 2.0})
add("keyword_tensor", scaled, (2,), (2,), argnums=(0, 1), kwargs={"shift": torch.ones(())})
add("default_arguments", lambda x, power=2, scale=3.0: scale * x**power, (3,))
add("var_arguments", spread, (2,), (2,), (2,), argnums=(0, 2))
add("partial", functools.partial(torch.addcmul, value=0.5), (2,), (2,), (2,), argnums=(0, 1))
add("callable_object", Polynomial(1.0, -2.0, 0.5), (3,))
add("bound_method", Polynomial(1.0, -2.0, 0.5).doubled, (3,))
add("aux_of_tensors", logged, (3,), has_aux=True)
add("aux_of_anything", lambda x: (x.sin(), {"word": "aux", "of": object}), (3,), has_aux=True)
add("aux_of_two_arguments", lambda x, y: (x * y, x), (2,), (2,), argnums=(0, 1), has_aux=True)
