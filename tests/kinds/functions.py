"""Functions as users write them, by what they do to tensors; the table's class is here too.

``program_kinds`` holds those that reach into torch, ``array_kinds`` linear algebra and layers,
``science_kinds`` and ``applied_kinds`` those of fields. A row is a function at a small float64
point. ``tests/house/test_coverage.py`` tries every transform on every row, beside torch.func.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from tests.kinds.problems import Args, constant, eye, of_shapes, values


@dataclass(frozen=True)
class FunctionKind:
    """A function at a point.

    ``other`` makes the second sample of a batch; without it that is a point near by. ``unsure``
    says why finite differences of the values are no judge of the derivative. ``is_compiled``: torch
    compiles what it calls, and a call that fails spoils those that follow.
    """

    family: str
    name: str
    func: Callable[..., Any]
    make_args: Callable[[str, torch.dtype], Args]
    argnums: int | tuple[int, ...] = 0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    has_aux: bool = False
    other: Callable[[str, torch.dtype], Args] | None = None
    unsure: str | None = None
    rtol: float = 1e-8
    is_compiled: bool = False


FUNCTION_KINDS: list[FunctionKind] = []


def family(title: str, into: list[FunctionKind]) -> Callable[..., None]:
    """A way to add rows: name, function, shapes of random arguments or a maker of them."""

    def add(
        name: str,
        func: Callable[..., Any],
        *shapes: tuple[int, ...],
        make: Callable[[str, torch.dtype], Args] | None = None,
        **more: Any,
    ) -> None:
        into.append(FunctionKind(title, name, func, make or of_shapes(*shapes), **more))

    return add


def numbers(*rows: Any) -> Callable[[str, torch.dtype], Args]:
    """Arguments of given numbers, for kinds that take another way at each sample."""
    return lambda device, dtype: tuple(
        torch.tensor(row, device=device, dtype=dtype) for row in rows
    )


def integers(like: Tensor, *numbers: int) -> Tensor:
    return torch.tensor(numbers, device=like.device)


C3, C4, C33, C34, C44 = (
    constant(k, *s) for k, s in enumerate([(3,), (4,), (3, 3), (3, 4), (4, 4)], 21)
)

# --- elementwise ---

add = family("Elementwise chains", FUNCTION_KINDS)


def safe_sqrt(x: Tensor) -> Tensor:
    """The double where: no nan comes back from the branch that is not taken."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), -x)


def straight_through(x: Tensor) -> Tensor:
    return (x + (x.round() - x).detach()) * x


def rotate_phase(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.exp(1j * x) * (1 + 2j))


add("swish_chain", lambda x: torch.tanh(x * torch.sigmoid(x)) - x / (1 + x.abs()), (4,))
add("softplus_by_hand", lambda x: torch.log1p(torch.exp(x)) * F.softplus(x, beta=2.0), (4,))
add("rational", lambda x: (x**3 - x) / (1 + x**2), (4,))
add("fractional_power", lambda x: x.abs() ** 1.5 * x.sign() + x.abs().pow(0.5), (4,))
add("power_of_two_arguments", lambda x, y: x.exp() ** y, (3,), (3,), argnums=(0, 1))
add("clamp_mix", lambda x: x.clamp(-0.5, 0.7) * x + x.clamp_min(0.1), (4,))
add("polar_angle", lambda x, y: torch.atan2(x, y) * torch.hypot(x, y), (3,), (3,), argnums=(0, 1))
add("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))), (4,))
add("double_where", safe_sqrt, (4,))
add("fmod_remainder", lambda x: x.fmod(0.7) * torch.remainder(x, 0.9), (4,))
add(
    "lerp_addcmul",
    lambda x, y, w: torch.lerp(x, y, w.sigmoid()).addcmul(x, y).addcdiv(x, w.exp()),
    (3,),
    (3,),
    (3,),
    argnums=(0, 1, 2),
)
add(
    "max_min",
    lambda x, y: torch.maximum(x, y) * torch.minimum(x, y.sin()),
    (3,),
    (3,),
    argnums=(0, 1),
)
add("broadcasting", lambda x, y: (x[:, None] * y + y.square()).sin(), (2,), (3,), argnums=(0, 1))
add("hyperbolic_chain", lambda x: torch.asinh(x.sinh() + x) + torch.atanh(x.tanh() / 2), (4,))
add("straight_through", straight_through, (4,), unsure="the derivative is meant to be another")
add("complex_inside", rotate_phase, (3,))
add("complex_product", lambda x: (torch.complex(x, x.sin()) ** 2).abs(), (3,))
add("dropout", lambda x: F.dropout(x.sin(), 0.5, training=True), (6,), unsure="random")
add("noise", lambda x: x * torch.randn_like(x), (4,), unsure="random")

# --- reductions ---

add = family("Reductions", FUNCTION_KINDS)

add("standardize", lambda x: (x - x.mean(0)) / (x.std(0) + 0.1), (3, 2))
add("logsumexp_of_rows", lambda x: torch.logsumexp(x, 1) - x.mean(1), (2, 3))
add("softmax_entropy", lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1), (2, 3))
add("prod_along", lambda x: (1 + x).prod(0), (3, 2))
add("prod_with_zero", lambda x: x.prod(), make=numbers([1.5, 0.0, -2.0]))
add("p_norms", lambda x: torch.stack([x.norm(p=3), x.norm(p=1), x.norm(p=float("inf"))]), (4,))
add("amax_amin", lambda x: x.amax(1) - x.amin(0).sum(), (2, 3))
add("max_with_ties", lambda x: x.amax(), make=numbers([1.0, 2.0, 2.0]), unsure="a kink")
add("cumsum_cumprod", lambda x: x.cumsum(0) * x.cumprod(0), (4,))
add("logcumsumexp", lambda x: x.logcumsumexp(0), (4,))
add("trapezoid", lambda x: torch.trapezoid(x.square(), dx=0.3), (5,))
add("median", lambda x: x.median() * x.square().median(), (5,))
add("quantile", lambda x: x.quantile(x.new_tensor([0.2, 0.5, 0.9])), (5,))
add("var_mean_pair", lambda x: torch.var_mean(x, 0), (3, 2))
add("kurtosis", lambda x: ((x - x.mean()) / x.std()).pow(4).mean(), (5,))
add("nansum", lambda x: torch.where(x > 0, x, torch.nan).nansum() ** 2, (4,))
add("covariance", lambda x: torch.cov(x), (2, 4))
add("correlation", lambda x: torch.corrcoef(x), (2, 4))
add("numerical_gradient", lambda x: torch.gradient(x, spacing=0.5)[0] * x, (5,))
add("differences", lambda x: torch.diff(x, n=2) * torch.diff(x)[1:], (5,))
add("soft_histogram", lambda x: torch.exp(-((x[:, None] - C3(x)) ** 2)).sum(0), (4,))
add("weighted_mean", lambda x, w: (x * w.softmax(0)).sum(), (3,), (3,), argnums=(0, 1))
add("safe_norm_at_zero", lambda x: (x.square().sum() + 0.01).sqrt(), make=numbers([0.0, 0.0]))

# --- indexing ---

add = family("Indexing, scatter, gather, masks", FUNCTION_KINDS)


def assign_by_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = 0.5
    return y * x


def sum_of_selected(x: Tensor) -> Tensor:
    """The mask picks another number of entries at another point."""
    return x[x > 0].square().sum()


def segment_sums(x: Tensor) -> Tensor:
    return x.new_zeros(2).index_add(0, integers(x, 0, 1, 0, 1), x.exp())


def put_accumulating(x: Tensor, y: Tensor) -> Tensor:
    return x.sin().index_put((integers(x, 0, 0),), y * y, accumulate=True)


def linear_interpolation(x: Tensor) -> Tensor:
    knots = torch.linspace(-2, 2, 5, dtype=x.dtype, device=x.device)
    heights = knots.sin()
    k = torch.searchsorted(knots, x.detach()).clamp(1, 4)
    part = (x - knots[k - 1]) / (knots[k] - knots[k - 1])
    return torch.lerp(heights[k - 1], heights[k], part) * x


def scatter_reduce(reduce: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, start: start.scatter_reduce(0, integers(x, 0, 1, 0, 1), x, reduce=reduce)


def with_index(*index: int, shape: tuple[int, ...]) -> Callable[[str, torch.dtype], Args]:
    return lambda device, dtype: (
        values(1, *shape, device=device, dtype=dtype),
        torch.tensor(index, device=device),
    )


add("gather_sorted", lambda x: x.gather(0, x.argsort()) * x, (4,))
add("index_select", lambda x: x.index_select(1, integers(x, 2, 0)) @ x[:, :2].T, (2, 3))
add("take_along_dim", lambda x: x.take_along_dim(x.argmax(1, keepdim=True), 1).square(), (2, 3))
add("index_given", lambda x, i: x[i].cumsum(0), make=with_index(2, 0, 2, shape=(3,)))
add("row_lookup", lambda x, i: F.embedding(i, x).tanh(), make=with_index(1, 1, 0, shape=(3, 2)))
add(
    "padded_lookup",
    lambda x, i: F.embedding(i, x, padding_idx=1).tanh(),
    make=with_index(2, 1, 0, shape=(3, 2)),
    unsure="the padded row has no gradient",
)
add(
    "bag_of_rows",
    lambda x, i: F.embedding_bag(i[None], x, mode="mean").square(),
    make=with_index(2, 0, 1, shape=(3, 2)),
)
add("segment_sums", segment_sums, (4,))
add("put_accumulating", put_accumulating, (3,), (2,), argnums=(0, 1))
add("scatter_add", lambda x: torch.zeros_like(x).scatter_add(0, integers(x, 1, 1, 2), x * x), (3,))
for reduction in ("prod", "mean", "amax"):
    add(f"scatter_reduce_{reduction}", scatter_reduce(reduction), (4,), (2,), argnums=(0, 1))
add(
    "index_reduce_prod",
    lambda x, y: y.index_reduce(0, integers(x, 0, 1, 0), x, "prod"),
    (3,),
    (2,),
    argnums=(0, 1),
)
add("masked_fill", lambda x: x.masked_fill(x < 0, -1.0).softmax(0), (4,))
add("masked_softmax", lambda x: x.masked_fill(x > 1.2, -torch.inf).softmax(0), (4,))
add("masked_scatter", lambda x, y: x.masked_scatter(x > 0, y) * x, (3,), (3,), argnums=(0, 1))
add(
    "mask_given",
    lambda x, m: torch.where(m, x.sin(), x**2).sum(),
    make=lambda device, dtype: (
        values(1, 3, device=device, dtype=dtype),
        torch.tensor([True, False, True], device=device),
    ),
)
add("assign_by_mask", assign_by_mask, (4,))
add(
    "sum_of_selected",
    sum_of_selected,
    make=numbers([1.0, -1.0, 0.5]),
    other=numbers([-1.0, -2.0, 0.5]),
)
add(
    "nonzero_product",
    lambda x: x[torch.nonzero(x > 0)[:, 0]].prod(),
    make=numbers([1.0, -1.0, 0.5]),
    other=numbers([1.0, 2.0, -0.5]),
)
add("paired_indices", lambda x: x[integers(x, 0, 1), integers(x, 2, 0)] * x[0, 0], (2, 3))
add("negative_steps", lambda x: x.flip(0)[::2] * torch.roll(x, 1)[1::2].sum(), (4,))
add("triangles", lambda x: torch.tril(x) @ torch.triu(x, 1) + torch.diag_embed(x[0]), (3, 3))
add("windows", lambda x: x.unfold(0, 3, 1).square().mean(1), (5,))
add("strided_windows", lambda x: x.as_strided((3, 2), (1, 1)).prod(1), (4,))
add("linear_interpolation", linear_interpolation, (3,))
add("splits", lambda x: torch.cat([part * part.sum() for part in x.split(3)]), (4,))
add("stack_of_unbound", lambda x: torch.stack([r.sin() for r in x.unbind(1)]), (2, 3))
add("repeat_interleave", lambda x: x.repeat_interleave(2) * x.repeat(2), (3,))
add(
    "padding_modes",
    lambda x: F.pad(x[None], (1, 2), "reflect") * F.pad(x[None], (2, 1), "circular"),
    (4,),
)
add("block_diagonal", lambda x, y: torch.block_diag(x, y.exp()), (1, 2), (2, 1), argnums=(0, 1))
add("pairs", lambda x: torch.cartesian_prod(x, x.sin()).prod(1), (3,))
add(
    "one_hot_product",
    lambda x, i: F.one_hot(i, 3).to(x.dtype) @ x,
    make=with_index(2, 0, shape=(3, 2)),
)
add("upper_entries", lambda x: (x @ x.T)[*torch.triu_indices(3, 3, 1, device=x.device)], (3, 2))
add("grid", lambda x: torch.stack(torch.meshgrid(x, x**2, indexing="ij")).prod(0), (3,))

# --- writing in place ---

add = family("Writing in place", FUNCTION_KINDS)


def filled_row_by_row(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(len(x)):
        out[i] = x[i] * (out[i - 1].clone() if i else 1)
    return out


def overwrites_what_backward_needs(x: Tensor) -> Tensor:
    """Without the clone autograd refuses; forward mode does not mind."""
    out = torch.zeros_like(x)
    for i in range(len(x)):
        out[i] = x[i] * (out[i - 1] if i else 1)
    return out


def filled_from_empty(x: Tensor) -> Tensor:
    """The buffer does not come from x, as user code writes it."""
    out = torch.empty(len(x), 2, dtype=x.dtype, device=x.device)
    out[:, 0] = x.sin()
    out[:, 1] = x.cos() * x
    return out


def gauss_seidel(b: Tensor) -> Tensor:
    x, A = b.clone(), C33(b) + 3 * eye(3, b)
    for _ in range(2):
        for i in range(3):
            x[i] = (b[i] - A[i] @ x + A[i, i] * x[i]) / A[i, i]
    return x


def through_views(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(2, 2)[0].mul_(x[2:])
    y.view(2, 2).t()[1].add_(1)
    return y * x


def mutates_argument(x: Tensor) -> Tensor:
    x.mul_(2)
    x[0] = x[1]
    return x.sin()


def mutates_a_constant(x: Tensor) -> Tensor:
    total = C3(x).clone()
    for k in range(3):
        total[k] += x[k] ** 2
    return total


def assigned_slices(x: Tensor) -> Tensor:
    y = x.repeat(2)
    y[1:4] = y[:3] * 2
    y[-1] -= x.sum()
    y[:2].copy_(x[1:])
    return y


def chain_in_place(x: Tensor) -> Tensor:
    return x.clone().mul_(2).add_(1).masked_fill_(x > 0.9, 0.3).clamp_(max=0.8).sigmoid_()


def overwritten_sigmoid(x: Tensor) -> Tensor:
    """The backward pass of the sigmoid needs its output."""
    return x.clone().sigmoid_().mul_(2) * x


def scatter_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.scatter_(0, integers(x, 0, 2), x[1:] ** 2)
    y.index_add_(0, integers(x, 1, 1), x[:2].sin())
    return y


add("filled_row_by_row", filled_row_by_row, (3,))
add("overwrites_what_backward_needs", overwrites_what_backward_needs, (3,))
add("filled_from_empty", filled_from_empty, (3,))
add("gauss_seidel", gauss_seidel, (3,))
add("through_views", through_views, (4,))
add("mutates_argument", mutates_argument, (3,))
add("mutates_a_constant", mutates_a_constant, (3,))
add("assigned_slices", assigned_slices, (3,))
add("chain_in_place", chain_in_place, (4,))
add("overwritten_sigmoid", overwritten_sigmoid, (4,))
add("scatter_in_place", scatter_in_place, (3,))
add("addmm_in_place", lambda x: torch.ones_like(x).addmm_(x, x, beta=0.5), (2, 2))

# --- control flow ---

add = family("Control flow", FUNCTION_KINDS)


def pairwise_tree(x: Tensor) -> Tensor:
    while len(x) > 1:
        x = x[::2] * x[1::2] + x[::2]
    return x[0]


def horner(x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for coefficient in (0.5, -1.0, 2.0, 3.0):
        total = total * x + coefficient
    return total


def branch_on_data(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x.sin()
    return x**2


def branch_on_item(x: Tensor) -> Tensor:
    return x * 2 if x[0].item() > 0 else x.exp()


def newton_until_converged(x: Tensor) -> Tensor:
    root = x
    while (root * root - x).abs().max() > 1e-13:
        root = (root + x / root) / 2
    return root


def power_by_count(x: Tensor, n: Tensor) -> Tensor:
    out = x
    for _ in range(int(n)):
        out = out * x.sin()
    return out


def halve_until_small(x: Tensor) -> Tensor:
    while x.norm().item() > 1:
        x = x * 0.5
    return x.tan()


def try_cholesky(x: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(x @ x.T - 0.5 * eye(2, x)).diagonal().log().sum()
    except torch.linalg.LinAlgError:
        return x.square().sum()


def memoized_powers(x: Tensor) -> Tensor:
    @functools.cache
    def power(n: int) -> Tensor:
        return x if n == 1 else power(n // 2) * power(n - n // 2)

    return power(5)


def twice_sine(x: Tensor) -> Tensor:
    return x.sin() * 2


def conditional(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, twice_sine, torch.square, (x,))


def is_below_three(count: Tensor, y: Tensor) -> Tensor:
    return count < 3


def counted_step(count: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return count + 1, y.sin() * 2


def counted_loop(x: Tensor) -> Tensor:
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    return while_loop(is_below_three, counted_step, (count, x))[1]


def scan_step(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    return carry * 0.5 + row.sin(), carry * row


def scanned(x: Tensor) -> Tensor:
    return scan(scan_step, torch.zeros_like(x[0]), x, dim=0)[1]


def combine(a: Tensor, b: Tensor) -> Tensor:
    return a * b + a


def associative(x: Tensor) -> Tensor:
    return associative_scan(combine, x, dim=0, combine_mode="generic")


BOTH_WAYS = {"make": numbers([0.5, 1.5]), "other": numbers([-0.5, -1.5])}

add("loop_over_shape", pairwise_tree, (4,))
add("horner", horner, (3,))
add("memoized_recursion", memoized_powers, (3,))
add("branch_on_data", branch_on_data, **BOTH_WAYS)
add("branch_on_item", branch_on_item, **BOTH_WAYS)
add("branch_on_assert", lambda x: x.log() if torch.all(x > 0) else x, **BOTH_WAYS)
add(
    "newton_until_converged",
    newton_until_converged,
    make=numbers([2.0, 3.0]),
    other=numbers([0.1, 40.0]),
)
add(
    "count_from_tensor",
    power_by_count,
    make=lambda device, dtype: (
        *numbers([0.5, 1.0])(device, dtype),
        torch.tensor(2, device=device),
    ),
    other=lambda device, dtype: (
        *numbers([0.3, 1.1])(device, dtype),
        torch.tensor(3, device=device),
    ),
)
add("halve_until_small", halve_until_small, make=numbers([3.0, 1.0]), other=numbers([0.1, 0.4]))
add(
    "try_and_except",
    try_cholesky,
    make=numbers([[1.0, 0.5], [0.2, 2.0]]),
    other=numbers([[0.1, 0.0], [0.0, 0.1]]),
)
add(
    "stopped_by_python_float",
    lambda x: x * float(x.detach().norm()),
    (3,),
    unsure="a factor is held constant",
)
add("torch_cond", conditional, is_compiled=True, **BOTH_WAYS)
add("torch_while_loop", counted_loop, (2,), is_compiled=True)
add("torch_scan", scanned, (2, 1), is_compiled=True)
add("torch_associative_scan", associative, (4, 2), is_compiled=True)
