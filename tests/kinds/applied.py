"""Functions of applications: robotics and geometry, physics and chemistry, learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kinds.functions import C3, C33, C34, FunctionKind, family, integers, numbers
from tests.kinds.problems import Args, eye, values

APPLIED_KINDS: list[FunctionKind] = []
BOTH = {"argnums": (0, 1)}
ALL3 = {"argnums": (0, 1, 2)}

# --- robotics, geometry ---

add = family("Robotics and geometry", APPLIED_KINDS)


def planar_arm(angles: Tensor) -> Tensor:
    total = angles.cumsum(0)
    return torch.stack([total.cos().sum(), total.sin().sum()])


def hat(w: Tensor) -> Tensor:
    zero = torch.zeros_like(w[0])
    rows = [zero, -w[2], w[1], w[2], zero, -w[0], -w[1], w[0], zero]
    return torch.stack(rows).view(3, 3)


def rodrigues(w: Tensor) -> Tensor:
    angle = w.norm()
    K = hat(w / angle)
    return eye(3, w) + angle.sin() * K + (1 - angle.cos()) * K @ K


def hat_in_place(w: Tensor) -> Tensor:
    """The matrix is filled entry by entry."""
    K = torch.zeros(3, 3, dtype=w.dtype, device=w.device)
    K[0, 1], K[0, 2], K[1, 2] = -w[2], w[1], -w[0]
    return torch.linalg.matrix_exp(K - K.T)


def rotation_log(X: Tensor) -> Tensor:
    R = rodrigues(X)
    angle = torch.acos((R.trace() - 1) / 2)
    return (
        angle
        / (2 * angle.sin())
        * torch.stack([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
    )


def quaternion_product(p: Tensor, q: Tensor) -> Tensor:
    a, u, b, v = p[:1], p[1:], q[:1], q[1:]
    return torch.cat([a * b - u @ v, a * v + b * u + torch.linalg.cross(u, v)])


def rotated(q: Tensor, v: Tensor) -> Tensor:
    q = q / q.norm()
    inverse = torch.cat([q[:1], -q[1:]])
    return quaternion_product(quaternion_product(q, F.pad(v, (1, 0))), inverse)[1:]


def slerp(p: Tensor, q: Tensor) -> Tensor:
    p, q = F.normalize(p, dim=0), F.normalize(q, dim=0)
    angle = torch.acos((p @ q).clamp(-0.999, 0.999))
    return ((0.3 * angle).sin() * p + (0.7 * angle).sin() * q) / angle.sin()


def gram_schmidt(x: Tensor) -> Tensor:
    """Rotation from six numbers."""
    a = F.normalize(x[:3], dim=0)
    b = F.normalize(x[3:] - (a @ x[3:]) * a, dim=0)
    return torch.stack([a, b, torch.linalg.cross(a, b)])


def chain_of_joints(angles: Tensor) -> Tensor:
    T = eye(4, angles)
    for k, angle in enumerate(angles):
        c, s, o, i = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
        link = [c, -s, o, i * 0.5 * (k + 1), s, c, o, o, o, o, i, i * 0.1, o, o, o, i]
        T = T @ torch.stack(link).view(4, 4)
    return T[:3, 3]


def rigid_motion(twist: Tensor) -> Tensor:
    top = torch.cat([hat(twist[:3]), twist[3:, None]], 1)
    return torch.linalg.matrix_exp(F.pad(top, (0, 0, 0, 1)))[:3]


def cart_pole(state: Tensor, force: Tensor) -> Tensor:
    x, v, angle, spin = state
    s, c = angle.sin(), angle.cos()
    push = (force[0] + 0.5 * spin**2 * s) / 1.1
    turn = (9.8 * s - c * push) / (0.5 * (4 / 3 - 0.1 * c**2 / 1.1))
    return torch.stack(
        [x + 0.02 * v, v + 0.02 * (push - 0.05 * turn * c), angle + 0.02 * spin, spin + 0.02 * turn]
    )


def bicycle(state: Tensor, control: Tensor) -> Tensor:
    x, y, heading, speed = state.unbind()
    slip = torch.atan(0.5 * control[1].tan())
    return torch.stack(
        [
            x + 0.1 * speed * (heading + slip).cos(),
            y + 0.1 * speed * (heading + slip).sin(),
            heading + 0.1 * speed * slip.sin(),
            speed + 0.1 * control[0],
        ]
    )


def reprojection(pose: Tensor, points: Tensor) -> Tensor:
    seen = points @ rodrigues(pose[:3]).T + pose[3:] + 5 * eye(3, pose)[2]
    return seen[:, :2] / seen[:, 2:]


def procrustes(X: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(X)
    return U @ Vh


def polygon_area(p: Tensor) -> Tensor:
    q = p.roll(-1, 0)
    return 0.5 * (p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]).sum()


add("planar_arm", planar_arm, (3,))
add("rodrigues", rodrigues, (3,))
add("rotation_by_filled_matrix", hat_in_place, (3,))
add("rotation_log", rotation_log, make=numbers([0.4, -0.7, 0.2]))
add("quaternion_product", quaternion_product, (4,), (4,), **BOTH)
add("quaternion_rotation", rotated, (4,), (3,), **BOTH)
add("slerp", slerp, (4,), (4,), **BOTH)
add("rotation_from_six", gram_schmidt, (6,))
add("chain_of_joints", chain_of_joints, (2,))
add("rigid_motion", rigid_motion, (6,))
add("cart_pole", cart_pole, (4,), (1,), **BOTH)
add("bicycle", bicycle, (4,), (2,), **BOTH)
add("reprojection", reprojection, (6,), (2, 3), **BOTH)
add("procrustes", procrustes, (2, 2))
add("polygon_area", polygon_area, (3, 2))

# --- physics, chemistry ---

add = family("Physics and chemistry", APPLIED_KINDS)


def lennard_jones(x: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    r2 = (x[i] - x[j]).square().sum(1)
    return 4 * (r2**-6 - r2**-3).sum()


def lennard_jones_by_cdist(x: Tensor) -> Tensor:
    r = torch.cdist(x, x) + 10 * eye(len(x), x)
    return 2 * (r**-12 - r**-6).sum()


def coulomb(x: Tensor, charge: Tensor) -> Tensor:
    offsets = x[:, None] - x[None]
    r = (offsets.square().sum(-1) + eye(len(x), x)).sqrt()
    return 0.5 * (torch.outer(charge, charge) / r * (1 - eye(len(x), x))).sum()


def dihedral(x: Tensor) -> Tensor:
    a, b, c = torch.diff(x, dim=0)
    m, n = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
    return torch.atan2(torch.linalg.cross(m, n) @ b / b.norm(), m @ n)


def n_body(x: Tensor) -> Tensor:
    offsets = x[None] - x[:, None]
    return (offsets / (offsets.square().sum(-1, keepdim=True) + 0.1) ** 1.5).sum(1)


def neo_hookean(G: Tensor) -> Tensor:
    J = torch.linalg.det(G)
    return 0.5 * ((G * G).sum() - 2 - 2 * J.log()) + J.log() ** 2


def stress(G: Tensor) -> Tensor:
    return torch.func.grad(neo_hookean)(G)


def mean_field(h: Tensor) -> Tensor:
    m = torch.zeros_like(h)
    for _ in range(3):
        m = torch.tanh(C33(h) @ m * 0.3 + h)
    return m


def periodic_forces(x: Tensor) -> Tensor:
    """Minimum image; the energy is differentiated inside."""

    def total(x: Tensor) -> Tensor:
        offsets = x[:, None] - x[None]
        offsets = offsets - (offsets / 3).round() * 3
        return torch.exp(-offsets.square().sum(-1)).sum()

    return -torch.func.grad(total)(x)


def double_pendulum(s: Tensor) -> Tensor:
    a, b, u, v = s
    mass = torch.stack(
        [torch.stack([2 + 0 * a, (a - b).cos()]), torch.stack([(a - b).cos(), 1 + 0 * a])]
    )
    force = torch.stack([-(v**2) * (a - b).sin() - 2 * a.sin(), u**2 * (a - b).sin() - b.sin()])
    return torch.cat([s[2:], torch.linalg.solve(mass, force)])


SPACED = numbers([[0.0, 0.1], [1.2, 0.0], [0.3, 1.3]])
add("lennard_jones", lennard_jones, make=SPACED)
add("lennard_jones_by_cdist", lennard_jones_by_cdist, make=SPACED)
add("coulomb", coulomb, (3, 2), (3,), **BOTH)
add("dihedral_angle", dihedral, (4, 3))
add("n_body", n_body, (3, 2))
add("neo_hookean", neo_hookean, make=numbers([[1.2, 0.1], [-0.2, 0.9]]))
add("neo_hookean_stress", stress, make=numbers([[1.2, 0.1], [-0.2, 0.9]]))
add("mean_field", mean_field, (3,))
add("periodic_forces", periodic_forces, (3, 2))
add("double_pendulum", double_pendulum, (4,))
add("relativistic_energy", lambda p: (p.square().sum(-1) + 1).sqrt().sum(), (2, 3))
add(
    "van_der_waals",
    lambda v, t: 8 * t.exp() / (3 * v.exp() + 1) - 3 / v.exp() ** 2,
    (2,),
    (2,),
    **BOTH,
)

# --- learning ---

add = family("Learning, dynamic programming", APPLIED_KINDS)


def softmax_regression(W: Tensor) -> Tensor:
    logits = C34(W) @ W
    return F.cross_entropy(logits, integers(W, 0, 1, 1)) + 0.1 * W.square().sum()


def sinkhorn(cost: Tensor) -> Tensor:
    f = torch.zeros_like(cost[:, 0])
    for _ in range(3):
        g = -torch.logsumexp(f[:, None] - cost, 0)
        f = -torch.logsumexp(g - cost, 1)
    return ((f[:, None] + g - cost).exp() * cost).sum()


def soft_dtw(D: Tensor) -> Tensor:
    n, m = D.shape
    far = torch.full_like(D[0, 0], 1e3)
    R = {(i, -1): far for i in range(n)} | {(-1, j): far for j in range(m)}
    R[-1, -1] = torch.zeros_like(far)
    for i in range(n):
        for j in range(m):
            before = torch.stack([R[i - 1, j], R[i, j - 1], R[i - 1, j - 1]])
            R[i, j] = D[i, j] - torch.logsumexp(-before, 0)
    return R[n - 1, m - 1]


def edit_table(D: Tensor) -> Tensor:
    """The table is a tensor, written in place."""
    R = torch.zeros(3, 3, dtype=D.dtype, device=D.device)
    for i in range(2):
        for j in range(2):
            R[i + 1, j + 1] = D[i, j] + R[i : i + 2, j : j + 2].clone().sum().sin()
    return R[2, 2]


def recurrent(W: Tensor, U: Tensor, xs: Tensor) -> Tensor:
    h = torch.zeros_like(W[0])
    for x in xs:
        h = torch.tanh(W @ h + U @ x)
    return h


def long_short_term(W: Tensor, xs: Tensor) -> Tensor:
    h = c = torch.zeros_like(W[:2, 0])
    for x in xs:
        i, f, o, g = (W @ torch.cat([h, x])).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


def fixed_point(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(4):
        z = torch.tanh(0.4 * C33(x) @ z + x)
    return z


def fixed_point_until(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    while True:
        new = 0.5 * z.sin() + x
        if torch.allclose(new, z, rtol=0, atol=1e-12):
            return new
        z = new


def forward_algorithm(transition: Tensor, emission: Tensor) -> Tensor:
    alpha = emission[0].log_softmax(0)
    for e in emission[1:]:
        alpha = (alpha[:, None] + transition.log_softmax(1)).logsumexp(0) + e.log_softmax(0)
    return alpha.logsumexp(0)


def expectation_step(x: Tensor, means: Tensor) -> Tensor:
    share = (-0.5 * (x[:, None] - means).square()).softmax(1)
    return (share * x[:, None]).sum(0) / share.sum(0)


def experts(x: Tensor, gate: Tensor) -> Tensor:
    """Only the best expert runs on its part."""
    weights = (gate @ x).softmax(0)
    best = weights.topk(1)
    return best.values * (C33(x)[best.indices[0]] * x).tanh()


def graph_convolution(x: Tensor, w: Tensor) -> Tensor:
    source, target = integers(x, 0, 1, 2, 0), integers(x, 1, 2, 0, 2)
    received = torch.zeros_like(x).index_add(0, target, x[source])
    return torch.relu((received + x) @ w)


def factorization_machine(V: Tensor, x: Tensor) -> Tensor:
    return 0.5 * ((x @ V).square() - x.square() @ V.square()).sum()


def volume_rendering(density: Tensor, color: Tensor) -> Tensor:
    alpha = 1 - torch.exp(-F.softplus(density))
    passed = torch.cumprod(torch.cat([torch.ones_like(alpha[:1]), 1 - alpha[:-1]]), 0)
    return (alpha * passed * color.sigmoid()).sum()


def newton_logistic(w: Tensor) -> Tensor:
    """A step of iteratively reweighted least squares."""
    X, y = C34(w)[:, :3], C3(w).sigmoid()
    p = (X @ w).sigmoid()
    H = X.T @ (X * (p * (1 - p))[:, None]) + 0.5 * eye(3, w)
    return w - torch.linalg.solve(H, X.T @ (p - y))


def page_rank(logits: Tensor) -> Tensor:
    P = logits.softmax(0)
    rank = torch.full_like(P[0], 1 / 3)
    for _ in range(4):
        rank = 0.85 * P @ rank + 0.05
    return rank


def fourier_features(x: Tensor) -> Tensor:
    powers = 2.0 ** torch.arange(3, dtype=x.dtype, device=x.device)
    return torch.cat([f(x[:, None] * powers).flatten() for f in (torch.sin, torch.cos)])


def momentum_step(state: dict[str, Tensor]) -> dict[str, Tensor]:
    gradient = torch.func.grad(lambda w: (C33(w) @ w).tanh().square().sum())(state["w"])
    v = 0.9 * state["v"] + gradient
    return {"w": state["w"] - 0.1 * v, "v": v}


def weights_and_speed(device: str, dtype: torch.dtype) -> Args:
    return ({k: values(n, 3, device=device, dtype=dtype) for n, k in enumerate("wv", 1)},)


add("softmax_regression", softmax_regression, (4, 2))
add("sinkhorn", sinkhorn, (3, 3))
add("soft_time_warping", soft_dtw, (2, 3))
add("table_in_place", edit_table, (2, 2))
add("recurrent_net", recurrent, (2, 2), (2, 1), (2, 1), **ALL3)
add("long_short_term_memory", long_short_term, (8, 3), (2, 1), **BOTH)
add("fixed_point", fixed_point, (3,))
add("fixed_point_until", fixed_point_until, make=numbers([0.5, 1.0]), other=numbers([-2.0, 0.0]))
add("forward_algorithm", forward_algorithm, (2, 2), (3, 2), **BOTH)
add("expectation_step", expectation_step, (4,), (2,), **BOTH)
add("best_expert", experts, (3,), (3, 3), **BOTH)
add("graph_convolution", graph_convolution, (3, 2), (2, 2), **BOTH)
add("factorization_machine", factorization_machine, (3, 2), (3,), **BOTH)
add("volume_rendering", volume_rendering, (4,), (4,), **BOTH)
add("newton_step", newton_logistic, (3,))
add("page_rank", page_rank, (3, 3))
add("fourier_features", fourier_features, (2,))
add("momentum_step", momentum_step, make=weights_and_speed)
