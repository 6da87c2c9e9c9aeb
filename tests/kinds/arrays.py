"""Functions of arrays: linear algebra, sparse products, signals, layers, losses, sorting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kinds.functions import C3, C4, C33, C34, C44, FunctionKind, family, integers, numbers
from tests.kinds.problems import Args, constant, eye, values

ARRAY_KINDS: list[FunctionKind] = []

# --- linear algebra ---

add = family("Linear algebra", ARRAY_KINDS)


def near_identity(*shapes: tuple[int, ...]) -> Callable[[str, torch.dtype], Args]:
    """A well conditioned matrix that is not symmetric, and what else there is."""

    def make(device: str, dtype: torch.dtype) -> Args:
        A = values(1, 3, 3, device=device, dtype=dtype)
        rest = (values(k, *s, device=device, dtype=dtype) for k, s in enumerate(shapes, 2))
        return A + 3 * eye(3, A), *rest

    return make


def symmetrized(X: Tensor) -> Tensor:
    return (X + X.mT) / 2


def spd(X: Tensor) -> Tensor:
    return X @ X.mT + 2 * eye(X.shape[-1], X)


def eigenprojector(X: Tensor) -> Tensor:
    """Onto the largest eigenvector: the same whatever its sign."""
    vector = torch.linalg.eigh(symmetrized(X)).eigenvectors[:, -1]
    return torch.outer(vector, vector)


def truncated_svd(X: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U[:, :1] * S[:1]) @ Vh[:1]


def square_root(X: Tensor) -> Tensor:
    """By Denman and Beavers."""
    Y, Z = spd(X), eye(len(X), X)
    for _ in range(8):
        Y, Z = (Y + torch.linalg.inv(Z)) / 2, (Z + torch.linalg.inv(Y)) / 2
    return Y


def expm_action(X: Tensor, v: Tensor) -> Tensor:
    term = total = v
    for k in range(1, 8):
        term = X @ term / k
        total = total + term
    return total


def cayley(X: Tensor) -> Tensor:
    S = X - X.T
    return torch.linalg.solve(eye(len(X), X) + S, eye(len(X), X) - S)


def conjugate_gradients(A: Tensor, b: Tensor) -> Tensor:
    A, x = spd(A), torch.zeros_like(b)
    residual = direction = b
    for _ in range(len(b)):
        step = (residual @ residual) / (direction @ A @ direction)
        x, fresh = x + step * direction, residual - step * (A @ direction)
        direction = fresh + (fresh @ fresh) / (residual @ residual) * direction
        residual = fresh
    return x


def lu_solved(A: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(A), b[:, None])[:, 0]


BOTH = {"argnums": (0, 1)}

add("solve_vector", torch.linalg.solve, make=near_identity((3,)), **BOTH)
add("solve_matrix", torch.linalg.solve, make=near_identity((3, 2)), **BOTH)
add(
    "solve_batch",
    lambda A, b: torch.linalg.solve(torch.stack([A, A.T]), b),
    make=near_identity((3,)),
    **BOTH,
)
add("solve_constant_matrix", lambda b: torch.linalg.solve(C33(b) + 3 * eye(3, b), b.sin()), (3,))
add("lu_solve", lu_solved, make=near_identity((3,)), **BOTH)
add(
    "solve_triangular",
    lambda A, b: torch.linalg.solve_triangular(A.tril(), b, upper=False),
    make=near_identity((3, 1)),
    **BOTH,
)
add(
    "triangular_solve",
    lambda b, A: torch.triangular_solve(b, A)[0],
    make=lambda d, t: near_identity((3, 1))(d, t)[::-1],
    **BOTH,
)
add("cholesky", lambda X: torch.linalg.cholesky(spd(X)), (3, 3))
add(
    "cholesky_of_batch",
    lambda X: torch.linalg.cholesky(spd(X)).diagonal(0, -2, -1).log(),
    (2, 2, 2),
)
add(
    "cholesky_solve",
    lambda X, b: torch.cholesky_solve(b, torch.linalg.cholesky(spd(X))),
    (2, 2),
    (2, 1),
    **BOTH,
)
add("cholesky_inverse", lambda X: torch.cholesky_inverse(torch.linalg.cholesky(spd(X))), (2, 2))
add("qr", lambda X: torch.linalg.qr(X), (3, 2))
add("singular_values", torch.linalg.svdvals, (3, 2))
add("truncated_svd", truncated_svd, (3, 2))
add("eigvalsh", lambda X: torch.linalg.eigvalsh(symmetrized(X)), (3, 3))
add("eigenprojector", eigenprojector, (3, 3))
add("eigenvalues_of_general", lambda X: torch.linalg.eigvals(X).abs().sum(), make=near_identity())
add("det", torch.linalg.det, make=near_identity())
add("det_of_batch", lambda X: torch.linalg.det(X) ** 2, (2, 2, 2))
add("det_of_singular", torch.linalg.det, make=numbers([[1.0, 2.0], [2.0, 4.0]]))
add("det_of_repeated_values", torch.linalg.det, make=numbers([[2.0, 0.0], [0.0, 2.0]]))
add("logdet", lambda X: torch.logdet(spd(X)), (3, 3))
add("slogdet", lambda X: torch.linalg.slogdet(X), make=near_identity())
add("inverse", torch.linalg.inv, make=near_identity())
add("pseudoinverse", torch.linalg.pinv, (3, 2))
add("least_squares", lambda A, b: torch.linalg.lstsq(A, b).solution, (3, 2), (3, 1), **BOTH)
add(
    "ridge_regression",
    lambda A, b: torch.linalg.solve(A.T @ A + 0.1 * eye(2, A), A.T @ b),
    (3, 2),
    (3,),
    **BOTH,
)
add("matrix_exp", torch.linalg.matrix_exp, (2, 2))
add("matrix_exp_action", expm_action, (2, 2), (2,), **BOTH)
add("matrix_power", lambda X: torch.linalg.matrix_power(X, 3), (2, 2))
add("negative_matrix_power", lambda X: torch.linalg.matrix_power(X, -2), make=near_identity())
add("matrix_square_root", square_root, (2, 2))
add("cayley_transform", cayley, (3, 3))
add("kronecker", torch.kron, (2, 2), (1, 2), **BOTH)
add("cross_product", lambda x, y: torch.linalg.cross(x, y.sin()), (3,), (3,), **BOTH)
add("multi_dot", lambda x, y: torch.linalg.multi_dot([x, C33(x), y]), (2, 3), (3, 2), **BOTH)
add("householder", lambda X: torch.linalg.householder_product(X, X[0]), (3, 2))
add("vandermonde", lambda x: torch.linalg.vander(x, N=3), (3,))
add("nuclear_norm", lambda X: torch.linalg.matrix_norm(X, "nuc"), (3, 2))
add("spectral_norm", lambda X: torch.linalg.matrix_norm(X, 2), (3, 2))
add("condition_number", torch.linalg.cond, make=near_identity())
add("trace_of_inverse", lambda X: torch.linalg.inv(spd(X)).trace(), (3, 3))
add("conjugate_gradients", conjugate_gradients, (3, 3), (3,), **BOTH)
add(
    "tensorsolve",
    lambda A, b: torch.linalg.tensorsolve(A.view(3, 3), b),
    make=near_identity((3,)),
    **BOTH,
)
add("tensorinv", lambda A: torch.linalg.tensorinv(A.view(3, 3, 1), ind=1), make=near_identity())
add(
    "ldl_free_quadratic",
    lambda X, b: b @ torch.linalg.inv_ex(spd(X)).inverse @ b,
    (2, 2),
    (2,),
    **BOTH,
)

# --- einsum, sparse ---

add = family("Einsum and sparse products", ARRAY_KINDS)

INDICES = ((0, 0, 1, 2), (0, 2, 1, 0))


def coo(like: Tensor) -> Tensor:
    where = torch.tensor(INDICES, device=like.device)
    return torch.sparse_coo_tensor(where, C4(like), (3, 3))


def csr(like: Tensor) -> Tensor:
    rows, columns = integers(like, 0, 2, 3, 4), integers(like, 0, 2, 1, 0)
    return torch.sparse_csr_tensor(rows, columns, C4(like), (3, 3))


def from_values(x: Tensor) -> Tensor:
    where = torch.tensor(INDICES, device=x.device)
    return torch.sparse_coo_tensor(where, x, (3, 3)) @ C34(x)


def tensor_train(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ir,rjs,sk->ijk", a, C33(a).view(3, 1, 3), b)


add(
    "bilinear_form",
    lambda x, y: torch.einsum("i,kij,j->k", x, C34(x).view(2, 3, 2), y),
    (3,),
    (2,),
    **BOTH,
)
add("batched_einsum", lambda x, y: torch.einsum("bij,bjk->bik", x, y), (2, 1, 2), (2, 2, 1), **BOTH)
add("einsum_diagonal", lambda x: torch.einsum("ii->i", x) * torch.einsum("ii", x), (3, 3))
add("tensor_train", tensor_train, (2, 3), (3, 1), **BOTH)
add("tensordot", lambda x, y: torch.tensordot(x, y, dims=([1], [0])).sin(), (2, 3), (3, 2), **BOTH)
add("sparse_coo_constant", lambda x: torch.sparse.mm(coo(x), x.sin()), (3, 2))
add("sparse_coo_vector", lambda x: coo(x) @ x.sin(), (3,))
add("sparse_csr_constant", lambda x: csr(x) @ x.sin(), (3, 2))
add("sparse_from_values", from_values, (4,))
add(
    "sparse_to_dense",
    lambda x: (
        torch.sparse_coo_tensor(torch.tensor(INDICES, device=x.device), x, (3, 3)).to_dense().sin()
    ),
    (4,),
)

# --- signals ---

add = family("Fourier transforms and signals", ARRAY_KINDS)


def spectral_derivative(u: Tensor) -> Tensor:
    k = torch.fft.rfftfreq(len(u), 1 / len(u), device=u.device, dtype=u.dtype)
    return torch.fft.irfft(1j * k * torch.fft.rfft(u), len(u)) * u


def spectrogram(x: Tensor) -> Tensor:
    window = torch.hann_window(4, dtype=x.dtype, device=x.device)
    return torch.stft(x, 4, 2, window=window, return_complex=True).abs().square()


def hilbert_envelope(x: Tensor) -> Tensor:
    weights = x.new_tensor([1, 2, 2, 1, 0, 0])
    return torch.fft.ifft(torch.fft.fft(x) * weights).abs()


def low_pass(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x)
    mask = torch.ones_like(spectrum.real)
    mask[:, -1] = 0
    return torch.fft.irfft2(spectrum * mask, x.shape)


def cosine_transform(x: Tensor) -> Tensor:
    return torch.fft.rfft(torch.cat([x, x.flip(0)])).real[: len(x)] * x


def recursive_filter(x: Tensor) -> Tensor:
    y = [x[0]]
    for k in range(1, len(x)):
        y.append(0.7 * y[-1] + x[k] * y[-1].tanh())
    return torch.stack(y)


add("power_spectrum", lambda x: torch.fft.rfft(x).abs().square(), (5,))
add(
    "fft_convolution",
    lambda x, y: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(y), 4),
    (4,),
    (4,),
    **BOTH,
)
add("spectral_derivative", spectral_derivative, (4,))
add("cosine_transform", cosine_transform, (4,))
add("spectrogram", spectrogram, (8,))
add("hilbert_envelope", hilbert_envelope, (6,))
add("low_pass_filter", low_pass, (2, 4))
add("fft_of_real_parts", lambda x: torch.view_as_real(torch.fft.fft(x)), (4,))
add("recursive_filter", recursive_filter, (4,))

# --- layers as functions ---

add = family("Convolutions, pooling, interpolation", ARRAY_KINDS)

K113, K2133 = constant(31, 1, 1, 3), constant(32, 2, 1, 3, 3)


def grid_sampled(x: Tensor, grid: Tensor, **options: Any) -> Tensor:
    return F.grid_sample(x, grid.tanh() * 0.8, align_corners=False, **options)


def warped(theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta[None], [1, 1, 2, 2], align_corners=False)
    image = C44(theta)[None, None]
    return F.grid_sample(image, grid * 0.3, align_corners=False)[0, 0]


def hermite_spline(t: Tensor, heights: Tensor) -> Tensor:
    slopes = torch.gradient(heights)[0]
    s = t.sigmoid() * 2
    k = s.detach().floor().long()
    u = s - k
    return (
        (1 + 2 * u) * (1 - u) ** 2 * heights[k]
        + u * (1 - u) ** 2 * slopes[k]
        + u**2 * (3 - 2 * u) * heights[k + 1]
        + u**2 * (u - 1) * slopes[k + 1]
    )


add("causal_conv1d", lambda x: F.conv1d(F.pad(x, (2, 0)), K113(x)).relu() * x, (1, 1, 4))
add(
    "conv2d_by_both",
    lambda x, w: F.conv2d(x, w, padding=1).tanh(),
    (1, 1, 2, 2),
    (1, 1, 2, 2),
    **BOTH,
)
add("conv2d_unbatched", lambda x: F.conv2d(x, K2133(x)).square(), (1, 3, 4))
add("depthwise_strided", lambda x: F.conv2d(x, K2133(x), stride=2, groups=2).sin(), (1, 2, 3, 5))
add("dilated_conv1d", lambda x: F.conv1d(x, K113(x), dilation=2) ** 2, (1, 1, 6))
add(
    "conv_transpose",
    lambda x, w: F.conv_transpose2d(x, w, stride=2).tanh(),
    (1, 1, 2, 1),
    (1, 1, 2, 2),
    **BOTH,
)
add("conv3d", lambda x: F.conv3d(x, torch.ones(1, 1, 2, 2, 1).to(x)).square(), (1, 1, 2, 2, 2))
add("avg_pool", lambda x: F.avg_pool2d(x, 2).square(), (1, 1, 2, 4))
add("max_pool", lambda x: F.max_pool2d(x, 2).square(), (1, 1, 2, 4))
add("max_pool_with_indices", lambda x: F.max_pool1d(x, 2, return_indices=True), (1, 4))
add("adaptive_pools", lambda x: F.adaptive_avg_pool1d(x, 2) * F.adaptive_max_pool1d(x, 2), (1, 5))
add("lp_pool", lambda x: F.lp_pool1d(x.exp()[None], 3, 2), (1, 4))
add("unfold_and_fold", lambda x: F.fold(F.unfold(x, 2).square(), (3, 3), 2), (1, 1, 3, 3))
add("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2).sin(), (1, 4, 1, 2))
add(
    "bilinear_upsampling",
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear").sin(),
    (1, 1, 2, 2),
)
add("bicubic_resize", lambda x: F.interpolate(x, (3, 2), mode="bicubic") ** 2, (1, 1, 2, 3))
add(
    "linear_and_nearest",
    lambda x: F.interpolate(x, 5, mode="linear") * F.interpolate(x, 5),
    (1, 1, 3),
)
add(
    "antialiased_resize",
    lambda x: F.interpolate(x, (2, 2), mode="bilinear", antialias=True) ** 2,
    (1, 1, 3, 3),
)
add("grid_sample", grid_sampled, (1, 1, 3, 3), (1, 2, 1, 2), **BOTH)
add(
    "grid_sample_bicubic",
    grid_sampled,
    (1, 1, 3, 3),
    (1, 1, 1, 2),
    kwargs={"mode": "bicubic"},
    **BOTH,
)
add("affine_warp", warped, (2, 3))
add("hermite_spline", hermite_spline, (2,), (4,), **BOTH)

add = family("Attention", ARRAY_KINDS)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def causal_by_hand(x: Tensor) -> Tensor:
    scores = x @ x.T / math.sqrt(x.shape[-1])
    ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ x


def rotary(x: Tensor) -> Tensor:
    angle = torch.arange(len(x), dtype=x.dtype, device=x.device)[:, None]
    a, b = x.chunk(2, -1)
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return (turned @ turned.T).softmax(-1) @ x


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.T @ v)) / (q @ k.sum(0))[:, None]


def many_heads(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x @ w).view(len(x), 3, 2, 1).permute(1, 2, 0, 3)
    return sdpa(q, k, v).transpose(0, 1).reshape(len(x), 2)


def with_float_mask(x: Tensor, bias: Tensor) -> Tensor:
    return sdpa(x, x.sin(), x, attn_mask=bias)


QKV = ((1, 1, 2, 2), (1, 1, 2, 2), (1, 1, 2, 2))
add("fused_attention", sdpa, *QKV, argnums=(0, 1, 2))
add("fused_attention_causal", sdpa, *QKV, argnums=(0, 1, 2), kwargs={"is_causal": True})
add("fused_attention_unbatched", lambda x: sdpa(x, x, x), (3, 2))
add("fused_attention_biased", with_float_mask, (2, 2), (2, 2), **BOTH)
add("causal_by_hand", causal_by_hand, (3, 2))
add("rotary_embedding", rotary, (3, 2))
add("linear_attention", linear_attention, (2, 2), (3, 2), (3, 1), argnums=(0, 1, 2))
add("many_heads", many_heads, (2, 2), (2, 6), **BOTH)
add("pooling_query", lambda q, x: (x @ q).softmax(0) @ x, (2,), (3, 2), **BOTH)

add = family("Normalization", ARRAY_KINDS)


def power_iterated(w: Tensor) -> Tensor:
    u = C3(w)[: len(w)]
    for _ in range(3):
        v = F.normalize(w.T @ u, dim=0)
        u = F.normalize(w @ v, dim=0)
    return w / (u @ w @ v)


def batch_norm(x: Tensor, training: bool) -> Tensor:
    mean, var = C3(x)[: x.shape[1]].clone(), C3(x)[: x.shape[1]].square()
    return F.batch_norm(x, mean, var, training=training)


WB = {"argnums": (0, 1, 2)}
add("layer_norm", lambda x, w, b: F.layer_norm(x, (3,), w, b), (2, 3), (3,), (3,), **WB)
add("layer_norm_in_a_net", lambda x: F.layer_norm(C33(x) @ x.sin(), (3,)).tanh().sum(), (3,))
add(
    "batch_norm",
    lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    (3, 2),
    (2,),
    (2,),
    **WB,
)
add("batch_norm_keeping_statistics", lambda x: batch_norm(x, True).sin(), (3, 2))
add("batch_norm_frozen", lambda x: batch_norm(x, False).sin(), (3, 2))
add("instance_norm", lambda x, w: F.instance_norm(x, weight=w).sin(), (1, 2, 3), (2,), **BOTH)
add("group_norm", lambda x, w: F.group_norm(x, 2, w).tanh(), (1, 4, 2), (4,), **BOTH)
add("rms_norm", lambda x, w: F.rms_norm(x, (3,), w, eps=1e-6).sin(), (2, 3), (3,), **BOTH)
add("normalize", lambda x: F.normalize(x, dim=1), (2, 3))
add("local_response_norm", lambda x: F.local_response_norm(x, 2, alpha=0.5), (1, 3, 2))
add(
    "layer_norm_by_hand",
    lambda x: (x - x.mean(1, True)) / (x.var(1, keepdim=True) + 0.1).sqrt(),
    (2, 3),
)
add(
    "weight_norm_by_hand",
    lambda v, g: g[:, None] * v / v.norm(dim=1, keepdim=True),
    (2, 3),
    (2,),
    **BOTH,
)
add("spectral_norm_by_power", power_iterated, (3, 2))

add = family("Losses", ARRAY_KINDS)


def ctc(x: Tensor) -> Tensor:
    one = integers(x, 1, 2)
    return F.ctc_loss(x.log_softmax(-1)[:, None], one[None], integers(x, 4), integers(x, 2))


def focal(x: Tensor) -> Tensor:
    p, y = x.sigmoid(), (C4(x) > 0).to(x.dtype)
    match = p * y + (1 - p) * (1 - y)
    return -((1 - match) ** 2 * match.log()).mean()


def dice(x: Tensor) -> Tensor:
    p, y = x.sigmoid(), (C4(x) > 0).to(x.dtype)
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def contrastive(x: Tensor, y: Tensor) -> Tensor:
    scores = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / 0.2
    return F.cross_entropy(scores, torch.arange(len(x), device=x.device))


def labels(like: Tensor) -> Tensor:
    return integers(like, 1, 0)


def signs(like: Tensor) -> Tensor:
    return C4(like).sign()


add("mean_squared_error", lambda x, y: F.mse_loss(x.sin(), y), (3,), (3,), **BOTH)
add(
    "smooth_l1_and_huber",
    lambda x: F.smooth_l1_loss(x, C4(x)) + F.huber_loss(x, C4(x), delta=0.5),
    (4,),
)
add("l1_unreduced", lambda x, y: F.l1_loss(x, y, reduction="none"), (3,), (3,), **BOTH)
add("cross_entropy", lambda x: F.cross_entropy(x, labels(x), label_smoothing=0.1), (2, 3))
add(
    "cross_entropy_weighted",
    lambda x: F.cross_entropy(x, integers(x, 1, -100), weight=C3(x).exp(), reduction="none"),
    (2, 3),
)
add(
    "cross_entropy_soft_targets",
    lambda x, t: F.cross_entropy(x, t.softmax(1)),
    (2, 3),
    (2, 3),
    **BOTH,
)
add("negative_log_likelihood", lambda x: F.nll_loss(x.log_softmax(1), labels(x)), (2, 3))
add(
    "bce_with_logits",
    lambda x, t: F.binary_cross_entropy_with_logits(x, t.sigmoid(), pos_weight=C3(x).exp()),
    (3,),
    (3,),
    **BOTH,
)
add("binary_cross_entropy", lambda x: F.binary_cross_entropy(x.sigmoid(), C3(x).sigmoid()), (3,))
add(
    "kl_divergence",
    lambda x, y: F.kl_div(x.log_softmax(0), y.log_softmax(0), reduction="sum", log_target=True),
    (3,),
    (3,),
    **BOTH,
)
add(
    "cosine_embedding",
    lambda x, y: F.cosine_embedding_loss(x, y, integers(x, 1, -1), 0.1),
    (2, 3),
    (2, 3),
    **BOTH,
)
add(
    "triplet",
    lambda a, p, n: F.triplet_margin_loss(a, p, n, margin=3.0),
    (2, 2),
    (2, 2),
    (2, 2),
    **WB,
)
add("margin_ranking", lambda x: F.margin_ranking_loss(x, x.sin(), signs(x), 1.0), (4,))
add("poisson_nll", lambda x: F.poisson_nll_loss(x, C4(x).exp()), (4,))
add("gaussian_nll", lambda x, v: F.gaussian_nll_loss(x, C3(x), v.exp()), (3,), (3,), **BOTH)
add("hinge", lambda x: F.hinge_embedding_loss(x, signs(x), margin=2.0), (4,))
add("soft_margin", lambda x: F.soft_margin_loss(x, signs(x)), (4,))
add("multi_margin", lambda x: F.multi_margin_loss(x, labels(x)), (2, 3))
add(
    "multilabel",
    lambda x: F.multilabel_soft_margin_loss(x, (C34(x)[:2, :3] > 0).to(x.dtype)),
    (2, 3),
)
add("ctc", ctc, (4, 3))
add("focal", focal, (4,))
add("dice", dice, (4,))
add("contrastive", contrastive, (2, 3), (2, 3), **BOTH)
add("wasserstein", lambda x: (x.sort().values - C4(x).sort().values).abs().sum(), (4,))

add = family("Sorting and selection", ARRAY_KINDS)


def sparsemax(x: Tensor) -> Tensor:
    ordered = x.sort(descending=True).values
    totals = ordered.cumsum(0) - 1
    count = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    k = (ordered * count > totals).sum()
    return (x - totals.gather(0, k[None] - 1) / k).clamp_min(0)


def soft_rank(x: Tensor) -> Tensor:
    return torch.sigmoid((x[:, None] - x[None]) * 2).sum(1)


add("sort", lambda x: x.sort(descending=True).values * C4(x), (4,))
add("argsort_rows", lambda x: x[x[:, 0].argsort()].cumsum(0), (3, 2))
add("topk_loss", lambda x: x.square().topk(2).values.sum(), (4,))
add("cummax_cummin", lambda x: x.cummax(0).values * x.cummin(0).values, (4,))
add("kthvalue_mode", lambda x: x.kthvalue(2).values * x.msort()[0], (4,))
add("soft_rank", soft_rank, (4,))
add("unique_values", lambda x: x.unique(return_inverse=True)[1] * x, (3,))
add("sparsemax", sparsemax, (4,))
