"""The table that tests and benchmarks share: a row is a function, a point, and what it stresses.

Each problem adds itself to every strategy, every law and every benchmark. Values are drawn in
float32 and converted, so that a problem has the same point in every dtype.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from optree.dataclasses import dataclass as optree_dataclass
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as torch_pytree
from torch.utils.checkpoint import checkpoint

Args = tuple[Any, ...]
NO_FORWARD_RULE = "no forward mode"
WRONG_FORWARD = "forward mode of .* is wrong here"


@dataclass(frozen=True)
class Problem:
    """A function at a point.

    ``jacobian(*args)`` is the closed form, in the tree that jacfunc returns; None where the looped
    oracle has to do. ``stress`` says what the problem tries, in words from ``STRESSES``.
    """

    name: str
    func: Callable[..., Any]
    make_args: Callable[[str, torch.dtype], Args]
    argnums: int | tuple[int, ...] = 0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    jacobian: Callable[..., Any] | None = None
    forward_refuses: str | None = None
    stress: frozenset[str] = frozenset()


STRESSES = {
    "smooth": "twice differentiable: has a Hessian",
    "hessian_forward_refuses": "torch's forward-over-reverse is missing or wrong",
    "differences": "float64 throughout: finite differences apply",
    "no_vmap": "func itself can't be vmapped over samples",
    "trees": "a container in or out",
    "torch_jacrev": "torch.func.jacrev refuses it, or is wrong",
    "torch_jacfwd": "torch.func.jacfwd refuses it, or is wrong",
    "torch_hessian": "torch.func.hessian refuses it, or is wrong",
}
NOT_TORCH = "torch_jacrev torch_jacfwd torch_hessian"

PROBLEMS: list[Problem] = []


def add(
    name: str,
    func: Callable[..., Any],
    *shapes: tuple[int, ...],
    make_args: Callable[[str, torch.dtype], Args] | None = None,
    stress: str = "smooth",
    **more: Any,
) -> None:
    """A row of the table; arguments are random tensors of the shapes, unless they are made."""
    words = frozenset(stress.replace("not_torch", NOT_TORCH).split())
    assert words <= STRESSES.keys(), words - STRESSES.keys()
    made = make_args or of_shapes(*shapes)
    PROBLEMS.append(Problem(name, func, made, stress=words, **more))


def values(seed: int, *shape: int, device: str = "cpu", dtype: torch.dtype) -> Tensor:
    """Fixed normal numbers, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)


def of_shapes(*shapes: tuple[int, ...]) -> Callable[[str, torch.dtype], Args]:
    def make(device: str, dtype: torch.dtype) -> Args:
        return tuple(
            values(k + 1, *shape, device=device, dtype=dtype) for k, shape in enumerate(shapes)
        )

    return make


def constant(seed: int, *shape: int) -> Callable[[Tensor], Tensor]:
    """A fixed array, in the dtype and on the device of its neighbour."""
    fixed = values(seed, *shape, dtype=torch.float64)
    return lambda like: fixed.to(like.device, like.dtype)


def eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


# --- made from a known matrix ---

A54, A47, B32 = constant(11, 5, 4), constant(12, 4, 7), constant(13, 3, 2)
Q4, A42 = constant(14, 4, 4), constant(15, 4, 2)

add("linear", lambda x: A54(x) @ x, (4,), jacobian=lambda x: A54(x), stress="smooth differences")
add("wide_linear", lambda x: A47(x) @ x, (7,), jacobian=lambda x: A47(x))
add("tall_linear", lambda x: A47(x).T @ x, (4,), jacobian=lambda x: A47(x).T)
add(
    "tanh_matrix",
    lambda x: torch.tanh(A54(x) @ x),
    (4,),
    jacobian=lambda x: (1 - torch.tanh(A54(x) @ x) ** 2)[:, None] * A54(x),
    stress="smooth differences",
)
add(
    "matrix_sandwich",
    lambda X: A54(X) @ X @ B32(X),
    (4, 3),
    jacobian=lambda X: torch.einsum("ik,lj->ijkl", A54(X), B32(X)),
)
add(
    "matrix_square",
    lambda X: X @ X,
    (3, 3),
    jacobian=lambda X: (
        torch.einsum("ik,lj->ijkl", eye(3, X), X) + torch.einsum("ik,lj->ijkl", X, eye(3, X))
    ),
    stress="smooth differences",
)
add(
    "quadratic_form",
    lambda x: x @ Q4(x) @ x,
    (4,),
    jacobian=lambda x: (Q4(x) + Q4(x).T) @ x,
    stress="smooth differences",
)
add(
    "bilinear_form",
    lambda x, y: x @ A54(x) @ y,
    (5,),
    (4,),
    argnums=(0, 1),
    jacobian=lambda x, y: (A54(x) @ y, x @ A54(x)),
)
add(
    "outer_product",
    lambda x, y: torch.outer(x, y),
    (3,),
    (2,),
    argnums=(0, 1),
    jacobian=lambda x, y: (
        torch.einsum("ik,j->ijk", eye(3, x), y),
        torch.einsum("i,jk->ijk", x, eye(2, x)),
    ),
)
add(
    "einsum",
    lambda X, Y: torch.einsum("bij,bjk->bik", X, Y),
    (2, 2, 3),
    (2, 3, 2),
    argnums=(0, 1),
)

# --- elementwise, reductions, scans ---


def _softmax_jacobian(x: Tensor) -> Tensor:
    s = torch.softmax(x, 0)
    return torch.diag(s) - torch.outer(s, s)


def _normalized_jacobian(x: Tensor) -> Tensor:
    unit = x / x.norm()
    return (eye(len(x), x) - torch.outer(unit, unit)) / x.norm()


add("sin", torch.sin, (5,), jacobian=lambda x: torch.diag(x.cos()), stress="smooth differences")
add(
    "exp_of_matrix",
    torch.exp,
    (2, 3),
    jacobian=lambda X: torch.diag(X.exp().reshape(-1)).reshape(2, 3, 2, 3),
)
add("relu", torch.relu, (6,), jacobian=lambda x: torch.diag((x > 0).to(x.dtype)), stress="")
add("gelu", F.gelu, (4,))
add("softmax", lambda x: torch.softmax(x, 0), (5,), jacobian=_softmax_jacobian)
add(
    "log_softmax",
    lambda x: torch.log_softmax(x, 0),
    (5,),
    jacobian=lambda x: eye(5, x) - torch.softmax(x, 0)[None, :],
    stress="smooth differences",
)
add("logsumexp", lambda x: torch.logsumexp(x, 0), (5,), jacobian=lambda x: torch.softmax(x, 0))
add(
    "cumsum",
    lambda x: torch.cumsum(x, 0),
    (5,),
    jacobian=lambda x: torch.tril(torch.ones(5, 5, dtype=x.dtype, device=x.device)),
)
add("cumprod", lambda x: torch.cumprod(x, 0), (4,))
add("prod", torch.prod, (4,))
add("norm", lambda x: x.norm(), (4,), jacobian=lambda x: x / x.norm())
add("normalize", lambda x: x / x.norm(), (4,), jacobian=_normalized_jacobian)
add("max_pool", lambda x: F.max_pool1d(x[None, None], 2)[0, 0], (6,), stress="")
add("sort", lambda x: torch.sort(x).values, (5,), stress="")
add(
    "topk",
    lambda x: torch.topk(x, 2),
    (5,),
    stress="trees not_torch",
)
add("power_spectrum", lambda x: torch.fft.rfft(x).abs().square(), (6,))
add(
    "rosenbrock",
    lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
    (5,),
    stress="smooth differences",
)

# --- stencils: sparse Jacobians ---

BURGERS_N, VISCOSITY = 8, 0.1


def burgers(u: Tensor) -> Tensor:
    """Periodic viscous Burgers equation, central differences."""
    right, left = torch.roll(u, -1), torch.roll(u, 1)
    return -u * (right - left) / 2 + VISCOSITY * (right - 2 * u + left)


def _burgers_jacobian(u: Tensor) -> Tensor:
    identity = eye(len(u), u)
    right, left = torch.roll(identity, -1, 0), torch.roll(identity, 1, 0)
    slope = (torch.roll(u, -1) - torch.roll(u, 1)) / 2
    transport = -torch.diag(slope) - torch.diag(u) @ (right - left) / 2
    return transport + VISCOSITY * (right - 2 * identity + left)


def bratu(u: Tensor) -> Tensor:
    """5-point Laplacian with zero boundary, and a reaction."""
    padded = F.pad(u, (1, 1, 1, 1))
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return around - 4 * u + torch.exp(u)


def _bratu_jacobian(u: Tensor) -> Tensor:
    n = u.shape[0]
    ones = torch.ones(n - 1, dtype=u.dtype, device=u.device)
    second = torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * eye(n, u)
    laplacian = torch.kron(second, eye(n, u)) + torch.kron(eye(n, u), second)
    return (laplacian + torch.diag(torch.exp(u).reshape(-1))).reshape(n, n, n, n)


def broyden(x: Tensor) -> Tensor:
    """Broyden's tridiagonal function."""
    padded = F.pad(x, (1, 1))
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def _broyden_jacobian(x: Tensor) -> Tensor:
    ones = torch.ones(len(x) - 1, dtype=x.dtype, device=x.device)
    return torch.diag(3 - 4 * x) - torch.diag(ones, -1) - 2 * torch.diag(ones, 1)


add("burgers", burgers, (BURGERS_N,), jacobian=_burgers_jacobian, stress="smooth differences")
add("bratu", bratu, (3, 3), jacobian=_bratu_jacobian, stress="smooth differences")
add("broyden_tridiagonal", broyden, (6,), jacobian=_broyden_jacobian)

# --- layers ---

EMBEDDED = (3, 0, 3)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1) @ v


def math_attention(x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x, x, x)


def embed(weight: Tensor) -> Tensor:
    return F.embedding(torch.tensor(EMBEDDED, device=weight.device), weight)


def _embed_jacobian(weight: Tensor) -> Tensor:
    rows = F.one_hot(torch.tensor(EMBEDDED, device=weight.device), weight.shape[0])
    return torch.einsum("ik,jl->ijkl", rows.to(weight.dtype), eye(weight.shape[1], weight))


def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor) -> Tensor:
    i_reset, i_update, i_new = (w_ih @ x).chunk(3)
    h_reset, h_update, h_new = (w_hh @ h).chunk(3)
    reset, update = torch.sigmoid(i_reset + h_reset), torch.sigmoid(i_update + h_update)
    return (1 - update) * torch.tanh(i_new + reset * h_new) + update * h


def mlp(params: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
    return hidden @ params["1.weight"].T + params["1.bias"]


def mlp_args(device: str, dtype: torch.dtype) -> Args:
    # the names are in the module's order, which is not sorted: 0.weight before 0.bias
    shapes = {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (2, 3), "1.bias": (2,)}
    params = {
        name: values(k, *shape, device=device, dtype=dtype)
        for k, (name, shape) in enumerate(shapes.items())
    }
    return params, values(9, 2, 2, device=device, dtype=dtype)


add("mlp_parameters", mlp, make_args=mlp_args, stress="smooth trees")
add("mlp_input", mlp, make_args=mlp_args, argnums=1)
add(
    "conv2d",
    lambda x, w: F.conv2d(x, w, padding=1),
    (1, 2, 3, 3),
    (2, 2, 2, 2),
    argnums=(0, 1),
    stress="",
)
add("conv2d_input", lambda x, w: torch.tanh(F.conv2d(x, w)), (1, 1, 4, 4), (2, 1, 3, 3))
add(
    "layer_norm",
    lambda x, w, b: F.layer_norm(x, (3,), w, b),
    (2, 3),
    (3,),
    (3,),
    argnums=(0, 1, 2),
    stress="smooth differences torch_hessian",
)
add(
    "batch_norm_train",
    lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    (4, 2),
    (2,),
    (2,),
    argnums=(0, 1, 2),
    stress="smooth differences torch_hessian",
)
add(
    "group_norm",
    lambda x, w, b: F.group_norm(x, 2, w, b),
    (1, 4, 2),
    (4,),
    (4,),
    argnums=(0, 1, 2),
    stress="smooth differences torch_hessian",
)
add(
    "instance_norm",
    lambda x, w: F.instance_norm(x, weight=w),
    (1, 2, 4),
    (2,),
    argnums=(0, 1),
    stress="smooth differences torch_hessian",
)
add(
    "rms_norm",
    lambda x, w: F.rms_norm(x, (3,), w, eps=1e-6),
    (2, 3),
    (3,),
    argnums=(0, 1),
    stress="smooth differences torch_hessian",
)
add("attention", attention, (2, 3), (3, 3), (3, 2), argnums=(0, 1, 2), stress="smooth differences")
add("math_attention", math_attention, (1, 3, 2))
add("embedding", embed, (4, 2), jacobian=_embed_jacobian)
add("gru_cell", gru_cell, (2,), (2,), (6, 2), (6, 2), argnums=(0, 1))
add(
    "cross_entropy",
    lambda x: F.cross_entropy(x, torch.tensor([1, 0], device=x.device), reduction="none"),
    (2, 3),
)
add(
    "checkpointed",
    lambda x: checkpoint(lambda y: torch.sin(A54(y) @ y), x, use_reentrant=False),
    (4,),
    jacobian=lambda x: torch.cos(A54(x) @ x)[:, None] * A54(x),
    stress="no_vmap torch_jacrev torch_hessian",
)

# --- linear algebra ---


def _spd(X: Tensor) -> Tensor:
    return X @ X.mT + 3 * eye(X.shape[-1], X)


def _solve_jacobian(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    inverse = torch.linalg.inv(A)
    return -torch.einsum("ik,l->ikl", inverse, inverse @ b), inverse


def _well_conditioned(device: str, dtype: torch.dtype) -> Args:
    A = values(1, 3, 3, device=device, dtype=dtype)
    return A + 3 * eye(3, A), values(2, 3, device=device, dtype=dtype)


def _inverse_jacobian(A: Tensor) -> Tensor:
    inverse = torch.linalg.inv(A)
    return -torch.einsum("ik,lj->ijkl", inverse, inverse)


def _only_matrix(device: str, dtype: torch.dtype) -> Args:
    return _well_conditioned(device, dtype)[:1]


def _scatter_args(device: str, dtype: torch.dtype) -> Args:
    return values(1, 4, device=device, dtype=dtype), values(2, 2, device=device, dtype=dtype)


def scatter_prod(x: Tensor, start: Tensor) -> Tensor:
    index = torch.tensor([0, 1, 0, 1], device=x.device)
    return start.scatter_reduce(0, index, x, reduce="prod")


add(
    "solve",
    torch.linalg.solve,
    make_args=_well_conditioned,
    argnums=(0, 1),
    jacobian=_solve_jacobian,
    stress="smooth differences",
)
add(
    "det",
    torch.linalg.det,
    make_args=_only_matrix,
    jacobian=lambda A: torch.linalg.det(A) * torch.linalg.inv(A).T,
    stress="smooth differences",
)
add("batched_det", torch.linalg.det, (1, 3, 3))
add(
    "slogdet",
    lambda A: torch.linalg.slogdet(A).logabsdet,
    make_args=_only_matrix,
    jacobian=lambda A: torch.linalg.inv(A).T,
)
add("inverse", torch.linalg.inv, make_args=_only_matrix, jacobian=_inverse_jacobian)
add("cholesky", lambda X: torch.linalg.cholesky(_spd(X)), (3, 3), stress="smooth differences")
add(
    "cholesky_inverse",
    lambda X: torch.cholesky_inverse(torch.tril(X)),
    make_args=_only_matrix,
    forward_refuses=WRONG_FORWARD,
    stress="smooth differences torch_jacfwd torch_hessian hessian_forward_refuses",
)
add("matrix_exp", torch.linalg.matrix_exp, (2, 2))
add(
    "cdist",
    lambda x: torch.cdist(x, A42(x)),
    (3, 2),
    forward_refuses=NO_FORWARD_RULE,
    stress="differences not_torch",
)
add(
    "scatter_reduce_prod",
    scatter_prod,
    make_args=_scatter_args,
    argnums=(0, 1),
    forward_refuses=WRONG_FORWARD,
    stress="differences torch_jacfwd torch_hessian",
)

# --- indexing, branches, writing in place ---


class OldSquare(torch.autograd.Function):
    """Forward and context in one: functorch refuses this style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * cotangent


def gather_last(x: Tensor) -> Tensor:
    return x[torch.tensor([2, 0, 2], device=x.device)]


def inplace_inside(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = y[1] * 2
    y.mul_(x)
    return y


def mutates_input(x: Tensor) -> Tensor:
    x.sin_()
    x[0] *= 2
    return x * 3


def data_dependent(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > -100 else x * 3


add(
    "indexing",
    gather_last,
    (3,),
    jacobian=lambda x: eye(3, x)[torch.tensor([2, 0, 2], device=x.device)],
)
add("take_diagonal", lambda X: X.diagonal() * X[0], (3, 3))
add("where", lambda x: torch.where(x > 0, x**3, torch.sin(x)), (5,), stress="")
add("inplace_inside", inplace_inside, (3,))
add(
    "mutates_input",
    mutates_input,
    (3,),
    jacobian=lambda x: torch.diag(3 * x.cos() * torch.tensor([2, 1, 1], device=x.device)),
    stress="smooth not_torch",
)
add(
    "data_dependent",
    data_dependent,
    (3,),
    jacobian=lambda x: 2 * eye(3, x),
    stress="no_vmap torch_hessian",
)
add(
    "old_style_function",
    OldSquare.apply,
    (3,),
    jacobian=lambda x: torch.diag(2 * x),
    forward_refuses=NO_FORWARD_RULE,
    stress="no_vmap not_torch",
)

# --- shapes, strides, dtypes ---


def _expanded(device: str, dtype: torch.dtype) -> Args:
    return (values(1, 3, device=device, dtype=dtype).expand(2, 3),)


def _transposed(device: str, dtype: torch.dtype) -> Args:
    return (values(1, 3, 2, device=device, dtype=dtype).T,)


def _strided(device: str, dtype: torch.dtype) -> Args:
    return (values(1, 8, device=device, dtype=dtype)[::2],)


def _mixed(device: str, dtype: torch.dtype) -> Args:
    other = torch.float32 if dtype == torch.float64 else torch.float64
    return (
        values(1, 3, device=device, dtype=dtype),
        values(2, 3, device=device, dtype=other),
    )


add("scalar", lambda x: x**3, (), jacobian=lambda x: 3 * x**2, stress="smooth differences")
add(
    "scalar_to_vector",
    lambda x: torch.stack([x, x.sin()]),
    (),
    jacobian=lambda x: torch.stack([torch.ones_like(x), x.cos()]),
)
add("single_element", lambda x: x.sin(), (1, 1))
add(
    "empty_input",
    lambda x: x.sum() + torch.ones(2, dtype=x.dtype, device=x.device),
    (0,),
    jacobian=lambda x: x.new_empty(2, 0),
    stress="not_torch",
)
add(
    "empty_output",
    lambda x: x[:0] * 2,
    (3,),
    jacobian=lambda x: x.new_empty(0, 3),
    stress="not_torch",
)
add(
    "empty_in_and_out",
    torch.sin,
    (0, 2),
    jacobian=lambda x: x.new_empty(0, 2, 0, 2),
    stress="not_torch",
)
add(
    "empty_leaf_beside_others",
    lambda t: {"a": t["full"] * 2, "b": t["empty"]},
    make_args=lambda device, dtype: (
        {
            "full": values(1, 2, device=device, dtype=dtype),
            "empty": values(2, 0, device=device, dtype=dtype),
        },
    ),
    stress="trees torch_hessian",
)
add(
    "expanded_input",
    lambda x: x.square() @ x.T,
    make_args=_expanded,
    stress="smooth torch_jacfwd torch_hessian",
)
add("transposed_input", lambda x: x.sin() @ x.T, make_args=_transposed)
add("strided_input", lambda x: x.cumsum(0) * x, make_args=_strided)
add("to_double", lambda x: x.double() * 2, (3,), stress="torch_hessian")
add("to_single", lambda x: x.float() * 2, (3,), stress="torch_hessian")
add(
    "mixed_inputs",
    lambda x, y: (x * 2, x * y, y.sum()),
    make_args=_mixed,
    argnums=(0, 1),
    stress="trees torch_hessian",
)

# --- constants, and leaves that are not differentiable ---


def _with_constants(device: str, dtype: torch.dtype) -> Args:
    return (
        {
            "x": values(1, 3, device=device, dtype=dtype),
            "index": torch.tensor([2, 0], device=device),
            "nothing": None,
            "name": "tanh",
            "scale": 2.0,
        },
    )


def use_constants(tree: dict[str, Any]) -> dict[str, Any]:
    y = getattr(torch, tree["name"])(tree["x"]) * tree["scale"]
    return {"y": y[tree["index"]], "nothing": tree["nothing"]}


add(
    "integer_output",
    lambda x: (x * 2, x.argmax()),
    (3,),
    jacobian=lambda x: (2 * eye(3, x), None),
    stress="trees not_torch",
)
add(
    "boolean_and_none_output",
    lambda x: {"mask": x > 0, "y": x.exp(), "none": None},
    (3,),
    jacobian=lambda x: {"mask": None, "y": torch.diag(x.exp()), "none": None},
    stress="trees not_torch",
)
add(
    "constants_in_tree",
    use_constants,
    make_args=_with_constants,
    stress="trees not_torch",
)
add(
    "constant_output",
    lambda x: torch.ones(2, dtype=x.dtype, device=x.device),
    (3,),
    jacobian=lambda x: x.new_zeros(2, 3),
    stress="torch_hessian",
)
add(
    "disconnected_output",
    lambda x: (x.sin(), torch.ones(2, dtype=x.dtype, device=x.device), x.detach() * 2),
    (3,),
    jacobian=lambda x: (torch.diag(x.cos()), x.new_zeros(2, 3), x.new_zeros(3, 3)),
    stress="trees",
)
add(
    "unused_argument",
    lambda x, y: x * 2,
    (3,),
    (2,),
    argnums=(0, 1),
    jacobian=lambda x, y: (2 * eye(3, x), x.new_zeros(3, 2)),
    stress="",
)
add("identity", lambda x: x, (3,), jacobian=lambda x: eye(3, x), stress="")
add(
    "same_output_twice",
    lambda x: (x, x, x.view(-1)),
    (2,),
    jacobian=lambda x: (eye(2, x), eye(2, x), eye(2, x)),
    stress="trees",
)

# --- arguments ---


add("second_argument", lambda x, y: x * y, (3,), (3,), argnums=1)
add(
    "negative_argument",
    lambda x, y: x * y**2,
    (3,),
    (3,),
    argnums=-1,
    jacobian=lambda x, y: torch.diag(2 * x * y),
    stress="smooth torch_jacfwd torch_hessian",
)
add(
    "negative_and_positive_arguments",
    lambda x, y, z: x * y**2 + z.sum(),
    (3,),
    (3,),
    (2,),
    argnums=(-1, 0),
    jacobian=lambda x, y, z: (torch.ones_like(x)[:, None] + 0 * z, torch.diag(y**2)),
    stress="smooth torch_jacfwd torch_hessian",
)
add(
    "tuple_of_one_argument",
    lambda x, y: x * y,
    (3,),
    (3,),
    argnums=(1,),
    jacobian=lambda x, y: (torch.diag(x),),
)
add(
    "keyword_arguments",
    lambda x, *, power, scale=1.0: scale * x**power,
    (3,),
    kwargs={"power": 3, "scale": 2.0},
    jacobian=lambda x: torch.diag(6 * x**2),
    stress="not_torch",
)

# --- trees ---


class Pair(NamedTuple):
    first: Any
    second: Any


@optree_dataclass(namespace="jacfunc")
class State:
    position: Any
    momentum: Any


@dataclass
class GlobalState:
    position: Any
    momentum: Any


optree.register_pytree_node(
    GlobalState,
    lambda state: ((state.position, state.momentum), None, None),
    lambda _, parts: GlobalState(*parts),
    # optree's sentinel for "every namespace"; it has no public name
    namespace=getattr(optree.registry, "__GLOBAL_NAMESPACE"),
)


class ModelOutput(OrderedDict):
    """Like HuggingFace's: torch's pytree knows it, optree does not."""


torch_pytree.register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output.keys())),
    lambda children, keys: ModelOutput(zip(keys, children, strict=True)),
)


def _dictionary(device: str, dtype: torch.dtype) -> Args:
    # keys in an order that is not sorted
    return (
        {
            "weight": values(1, 2, 3, device=device, dtype=dtype),
            "bias": values(2, 2, device=device, dtype=dtype),
            "a": values(3, 3, device=device, dtype=dtype),
        },
    )


def _nested(device: str, dtype: torch.dtype) -> Args:
    x, y, z = (values(k, 2, device=device, dtype=dtype) for k in range(3))
    return ({"b": [x, (y, None)], "a": OrderedDict(z=Pair(z, ()), y=torch.tensor(1))},)


def _wrapped(kind: Callable[[Any, Any], Any]) -> Callable[[str, torch.dtype], Args]:
    def make(device: str, dtype: torch.dtype) -> Args:
        return (
            kind(
                values(1, 3, device=device, dtype=dtype), values(2, 3, device=device, dtype=dtype)
            ),
        )

    return make


def affine(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"z": tree["weight"] @ tree["a"] + tree["bias"], "b": tree["bias"] ** 2}


def through_nested(tree: dict[str, Any]) -> list[Any]:
    x, (y, _) = tree["b"]
    z = tree["a"]["z"].first
    return [x * y, {"later": z.sin(), "earlier": (x + z).sum()}, Pair(y, None)]


def oscillate(state: Any) -> Any:
    return type(state)(state.position + state.momentum, -state.position.sin())


def output_of(x: Tensor) -> ModelOutput:
    return ModelOutput(logits=x.sin(), hidden=(x * 2, x**2))


def through_output(output: ModelOutput) -> ModelOutput:
    return ModelOutput(z=output["z"] * output["a"], a=output["a"].sin())


add(
    "dictionary",
    affine,
    make_args=_dictionary,
    jacobian=lambda tree: {
        "z": {
            "weight": torch.einsum("ij,k->ijk", eye(2, tree["a"]), tree["a"]),
            "bias": eye(2, tree["a"]),
            "a": tree["weight"],
        },
        "b": {
            "weight": tree["a"].new_zeros(2, 2, 3),
            "bias": torch.diag(2 * tree["bias"]),
            "a": tree["a"].new_zeros(2, 3),
        },
    },
    stress="smooth trees",
)
add(
    "ordered_dictionary",
    lambda tree: OrderedDict(z=tree["z"] * tree["a"], a=tree["a"].sin()),
    make_args=_wrapped(lambda z, a: OrderedDict(z=z, a=a)),
    stress="smooth trees",
)
add(
    "list_and_tuple",
    lambda tree: (tree[0] * tree[1], [tree[0]]),
    make_args=_wrapped(lambda x, y: [x, y]),
    stress="smooth trees",
)
add(
    "named_tuple",
    lambda p: Pair(p.first * p.second, p.first.sin()),
    make_args=_wrapped(Pair),
    stress="smooth trees",
)
add(
    "nested_trees",
    through_nested,
    make_args=_nested,
    stress="smooth trees not_torch",
)
add(
    "dataclass_in_namespace",
    oscillate,
    make_args=_wrapped(State),
    stress="smooth trees not_torch",
)
add(
    "dataclass_registered_globally",
    oscillate,
    make_args=_wrapped(GlobalState),
    stress="smooth trees not_torch",
)
add("torch_registered_output", output_of, (3,), stress="smooth trees")
add(
    "torch_registered_input",
    through_output,
    make_args=_wrapped(lambda z, a: ModelOutput(z=z, a=a)),
    stress="smooth trees",
)
add(
    "trees_in_two_arguments",
    lambda tree, pair: {"y": affine(tree)["z"] * pair.second[:2], "x": pair.first.sum()},
    make_args=lambda device, dtype: (*_dictionary(device, dtype), *_wrapped(Pair)(device, dtype)),
    argnums=(1, 0),
    stress="smooth trees",
)

BY_NAME = {problem.name: problem for problem in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "two problems share a name"
