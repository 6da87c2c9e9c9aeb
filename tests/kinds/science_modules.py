"""Small stand-ins for the modules of scientific libraries: a batch in front, float64, few numbers.

Each says in a line what it stands for. Those in ``COUPLED`` let samples depend on each other;
those that ``looks`` choose their path by the numbers of the batch, and never let it show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests.kinds.modules import floats, integers

B = 4


class ScienceModule(NamedTuple):
    """A module and its batches: a batch for every seed, all of the same shapes."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    looks: bool = False

    def make(self) -> nn.Module:
        """In eval mode and float64, with no scale, shift or statistic as it starts."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = self.build().double().eval()
            with torch.no_grad():
                for param in module.parameters():
                    param += 0.2 * torch.randn_like(param)
                for name, buffer in module.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.normal_()
        return module


SCIENCE_MODULES: list[ScienceModule] = []
COUPLED: list[ScienceModule] = []


def samples(*shapes: tuple[int, ...]) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches of normal numbers, an input for each shape of one sample."""
    return lambda seed: tuple(floats(B, *s, seed=10 * seed + n) for n, s in enumerate(shapes))


def stands_for(
    name: str,
    *shapes: tuple[int, ...],
    inputs: Callable[[int], tuple[Tensor, ...]] | None = None,
    looks: bool = False,
    within: list[ScienceModule] = SCIENCE_MODULES,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Add a class to the table."""

    def add(build: type[nn.Module]) -> type[nn.Module]:
        within.append(ScienceModule(name, build, inputs or samples(*shapes), looks))
        return build

    return add


class Parts(nn.Module):
    """Children and parameters by name, so that a stand-in is its forward and little else."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif part.is_floating_point():
                self.register_parameter(name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)


def normal(*shape: int) -> Tensor:
    return 0.5 * torch.randn(shape)


# --- graphs and point clouds ---

EDGES = torch.tensor([[0, 1, 1, 2, 0], [1, 0, 2, 1, 2]])


class Messages(Parts):
    """Sends along edges, adds up at nodes."""

    def __init__(self) -> None:
        super().__init__(send=nn.Linear(4, 2), update=nn.Linear(4, 2), edges=EDGES.clone())

    def passed(self, x: Tensor, edges: Tensor, dim: int) -> Tensor:
        source, target = x.index_select(dim, edges[0]), x.index_select(dim, edges[1])
        messages = self.send(torch.cat([source, target], -1)).tanh()
        received = torch.zeros_like(x).index_add(dim, edges[1], messages)
        return self.update(torch.cat([x, received], -1)).sin()


@stands_for("message passing", (3, 2))
class GraphOfASample(Messages):
    def forward(self, x: Tensor) -> Tensor:
        return self.passed(x, self.edges, 1).sum(1)


@stands_for("graphs side by side", (3, 2))
class DisjointGraphs(Messages):
    """PyG's batch: the nodes of all graphs in one row, and the number of each node's graph."""

    def forward(self, x: Tensor) -> Tensor:
        size, nodes = x.shape[:2]
        starts = nodes * torch.arange(size)
        edges = (self.edges[:, None] + starts[:, None]).flatten(1)
        h = self.passed(x.flatten(0, 1), edges, 0)
        return h.new_zeros(size, 2).index_add(0, torch.arange(size).repeat_interleave(nodes), h)


@stands_for("one graph for the whole batch", (2,), within=COUPLED)
class OneGraph(Messages):
    """Its nodes are the samples."""

    def forward(self, x: Tensor) -> Tensor:
        edges = self.edges if len(x) > 2 else torch.zeros(2, 1, dtype=torch.long)
        return self.passed(x, edges, 0)


@stands_for("sparse adjacency", (3, 2))
class SparseAdjacency(Parts):
    """The batch behind the nodes, as a sparse product wants it."""

    def __init__(self) -> None:
        super().__init__(layer=nn.Linear(2, 2), out=nn.Linear(2, 1), edges=EDGES.clone())

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.ones(self.edges.shape[1], dtype=x.dtype)
        adjacency = torch.sparse_coo_tensor(self.edges, weights, (3, 3))
        h = self.layer(x).transpose(0, 1)
        h = torch.sparse.mm(adjacency, h.reshape(3, -1)).view(h.shape).tanh()
        return self.out(h).mean(0)


@stands_for("graph transformer", (3, 4), (3, 3))
class GraphTransformer(Parts):
    """Attention between nodes, with a bias for each edge."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(4, 12), edge=nn.Linear(1, 2), out=nn.Linear(4, 1))

    def forward(self, x: Tensor, distance: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        bias = self.edge(distance[..., None]).movedim(-1, 1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(x + h.transpose(1, 2).flatten(2)).squeeze(-1)


@stands_for("equivariant graph layer", (3, 2), (3, 3))
class Equivariant(Parts):
    """EGNN: features that do not turn, coordinates that do; two outputs."""

    def __init__(self) -> None:
        super().__init__(message=nn.Linear(5, 2), move=nn.Linear(2, 1, bias=False))

    def forward(self, h: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        between = at[:, :, None] - at[:, None]
        pairs = [h[:, :, None].expand(-1, -1, 3, -1), h[:, None].expand(-1, 3, -1, -1)]
        m = self.message(torch.cat([*pairs, between.square().sum(-1, True)], -1)).tanh()
        return m.sum((1, 2)), at.mean(1) + (between * self.move(m)).sum(2)[:, 0]


@stands_for("tensor product of vectors", (2, 3), (2, 3))
class TensorProduct(Parts):
    """e3nn: paths of 1 ⊗ 1 to scalars and vectors, a weight for each."""

    def __init__(self) -> None:
        super().__init__(scalar=normal(2, 2, 2), vector=normal(2, 2, 1), gate=nn.Linear(2, 1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        dots = torch.einsum("bui,bvi,uvw->bw", x, y, self.scalar)
        crossed = torch.linalg.cross(x[:, :, None], y[:, None], dim=-1)
        return dots, torch.einsum("buvi,uvw->bwi", crossed, self.vector)[:, 0] * self.gate(dots)


@stands_for("forces by a gradient inside", (3, 3))
class Forces(Parts):
    """SchNet, MACE: the energy of atoms, and minus its gradient in their places."""

    def __init__(self) -> None:
        super().__init__(inner=nn.Linear(3, 3), out=nn.Linear(3, 1))

    def forward(self, at: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = at if at.requires_grad else at.detach().requires_grad_()
            distance = (at[:, [0, 0, 1]] - at[:, [1, 2, 2]]).square().sum(-1).exp().neg().exp()
            energy = self.out(self.inner(distance).tanh()).squeeze(-1)
            (slope,) = torch.autograd.grad(energy.sum(), at, create_graph=True)
        return energy, -slope[:, 0]


@stands_for("nearest neighbours", (4, 2), looks=True)
class Neighbours(Parts):
    """DGCNN: a graph by topk over distances."""

    def __init__(self) -> None:
        super().__init__(layer=nn.Linear(4, 3), out=nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        near = torch.cdist(x, x).topk(2, largest=False).indices
        rows = torch.arange(len(x))[:, None, None]
        h = self.layer(torch.cat([x[:, :, None].expand(-1, -1, 2, -1), x[rows, near]], -1))
        return self.out(h.tanh().amax(2).mean(1))


@stands_for(
    "nets of atoms",
    inputs=lambda seed: (floats(B, 3, 2, seed=seed), integers(2, B, 3, seed=seed)),
    looks=True,
)
class AtomicNets(Parts):
    """TorchANI: the atoms of a kind, of all molecules, go through its net together."""

    def __init__(self) -> None:
        super().__init__(first=nn.Linear(2, 2), second=nn.Linear(2, 2))

    def forward(self, x: Tensor, species: Tensor) -> Tensor:
        energies, flat = x.new_zeros(species.numel(), 2), x.flatten(0, 1)
        for number, net in enumerate((self.first, self.second)):
            (chosen,) = (species.flatten() == number).nonzero(as_tuple=True)
            if len(chosen):
                energies = energies.index_add(0, chosen, net(flat[chosen]).sin())
        return energies.view(*species.shape, 2).sum(1)


# --- flows and densities ---


@stands_for("coupling flow", (4,))
class CouplingFlow(Parts):
    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        for _ in range(2):
            scale, shift = self.net(a).chunk(2, -1)
            a, b = b * scale.tanh().exp() + shift, a
        return torch.cat([a, b], -1), scale.tanh().sum(-1)


@stands_for("spline flow", (2,), looks=True)
class SplineFlow(Parts):
    """nflows: a rational-quadratic spline, its bin found by searchsorted and gathered."""

    def __init__(self) -> None:
        super().__init__(net=nn.Linear(1, 11), first=normal(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, z = x.tanh().split(1, -1)
        widths, heights, slopes = self.net(a).split([4, 4, 3], -1)
        knots = [F.pad(w.softmax(-1).cumsum(-1), (1, 0)) * 2 - 1 for w in (widths, heights)]
        slopes = F.pad(F.softplus(slopes), (1, 1), value=1.0)
        number = torch.searchsorted(knots[0][..., 1:-1].contiguous(), z)
        low, high = ([k.gather(-1, number + n) for k in (*knots, slopes)] for n in (0, 1))
        (x0, y0, d0), (x1, y1, d1) = low, high
        steep, t = (y1 - y0) / (x1 - x0), (z - x0) / (x1 - x0)
        below = steep + (d0 + d1 - 2 * steep) * t * (1 - t)
        y = y0 + (y1 - y0) * (steep * t * t + d0 * t * (1 - t)) / below
        return torch.cat([a * self.first.exp().mean(), y], -1), below.log().squeeze(-1)


@stands_for("masked autoregression", (3,))
class Autoregression(Parts):
    """MADE: weights times a mask."""

    def __init__(self) -> None:
        super().__init__(weight=normal(3, 3), bias=normal(3), out=nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(3, 3, dtype=x.dtype).tril(-1)
        h = F.linear(x, self.weight * mask, self.bias).tanh()
        return F.linear(h, self.out.weight * mask.T.flip(0, 1).tril(), self.out.bias)


@stands_for("mixture density", (2,))
class MixtureDensity(Parts):
    def __init__(self) -> None:
        super().__init__(body=nn.Linear(2, 3), head=nn.Linear(3, 6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits, mean, scale = self.head(self.body(x).tanh()).chunk(3, -1)
        return {"logits": logits.log_softmax(-1), "mean": mean, "scale": scale.exp()}


@stands_for("likelihood of a mixture", (2,), (), looks=True)
class MixtureLikelihood(MixtureDensity):
    """Distributions that check their arguments."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        of = super().forward(x)
        parts = D.Normal(of["mean"], of["scale"], validate_args=True)
        weights = D.Categorical(logits=of["logits"], validate_args=True)
        return D.MixtureSameFamily(weights, parts, validate_args=True).log_prob(y)[:, None]


@stands_for("continuous flow", (2,))
class ContinuousFlow(Parts):
    """FFJORD: steps of a field, and its divergence by gradients inside."""

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            total = x.new_zeros(len(x))
            for _ in range(2):
                field = self.net(x)
                for i in range(2):
                    (row,) = torch.autograd.grad(field[:, i].sum(), x, create_graph=True)
                    total = total + 0.1 * row[:, i]
                x = x + 0.1 * field
        return x, total


# --- differential equations ---


class Field(Parts):
    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))


@stands_for("neural ODE", (2,))
class NeuralOde(Field):
    """Runge and Kutta's fourth order."""

    def forward(self, x: Tensor) -> Tensor:
        h = 0.5
        for _ in range(2):
            k1 = self.net(x)
            k2 = self.net(x + h / 2 * k1)
            k3 = self.net(x + h / 2 * k2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + self.net(x + h * k3))
        return x


class Adjoint(torch.autograd.Function):
    """Torchdiffeq's way: the backward pass goes back in time, with gradients of its own."""

    @staticmethod
    def forward(ctx: Any, field: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(2):
                x = x + 0.2 * field(x)
        ctx.field = field
        ctx.save_for_backward(x, *params)
        return x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        x, *params = ctx.saved_tensors
        totals = [torch.zeros_like(p) for p in params]
        for _ in range(2):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                speed = ctx.field(x)
                back, *more = torch.autograd.grad(speed, (x, *params), slope)
            x = x - 0.2 * speed.detach()
            slope = slope + 0.2 * back
            totals = [t + 0.2 * m for t, m in zip(totals, more, strict=True)]
        return None, slope, *totals


@stands_for("neural ODE with an adjoint", (2,))
class AdjointOde(Field):
    def forward(self, x: Tensor) -> Tensor:
        return Adjoint.apply(self.net, x, *(p for p in self.net.parameters() if p.requires_grad))


@stands_for("an adjoint that asks for every parameter", (2,))
class AdjointOfAll(Field):
    """As if all of them required a gradient, whatever the network is differentiated by."""

    def forward(self, x: Tensor) -> Tensor:
        return Adjoint.apply(self.net, x, *self.net.parameters())


@stands_for(
    "steps of each sample", inputs=lambda seed: (seed * floats(B, 2, seed=seed),), looks=True
)
class OwnSteps(Field):
    """Torchode: each sample has its own step, until the last has arrived."""

    def forward(self, x: Tensor) -> Tensor:
        time, step = torch.zeros_like(x[:, 0]), torch.full_like(x[:, 0], 0.5)
        while (active := time < 1).any():
            coarse = x + step[:, None] * self.net(x)
            fine = x + step[:, None] / 2 * self.net(x)
            fine = fine + step[:, None] / 2 * self.net(fine)
            good = (coarse - fine).detach().abs().amax(1) < 0.02
            x = torch.where((active & good)[:, None], fine, x)
            time = torch.where(active & good, time + step, time)
            step = torch.where(good, step, step / 2)
        return x


class CommonSteps(Field):
    """Torchdiffeq: one step for all samples, which fits the worst."""

    def forward(self, x: Tensor) -> Tensor:
        time, step = 0.0, 0.5
        while time < 1:
            coarse = x + step * self.net(x)
            fine = x + step / 2 * self.net(x)
            fine = fine + step / 2 * self.net(fine)
            if (coarse - fine).abs().max().item() < 0.02:
                x, time = fine, time + step
            else:
                step /= 2
        return x


@stands_for("stochastic equation", (2,), (3, 2))
class Stochastic(Parts):
    """Torchsde: drift and diffusion, the noise given."""

    def __init__(self) -> None:
        super().__init__(drift=nn.Linear(2, 2), diffusion=nn.Linear(2, 2))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        for dw in noise.unbind(1):
            x = x + 0.3 * self.drift(x).tanh() + 0.5 * self.diffusion(x).sigmoid() * dw
        return x


@stands_for("residual of an equation", (1,), (1,))
class Residual(Field):
    """PINN: derivatives of a net in its inputs."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            t, x = (v if v.requires_grad else v.detach().requires_grad_() for v in (t, x))
            u = self.net(torch.cat([t, x], 1))[:, :1]
            u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
            (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return u_t + u * u_x - 0.1 * u_xx


@stands_for("Hamiltonian net", (2,))
class Hamiltonian(Field):
    """A field that is the turned gradient of a net."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x)[:, 0].sum(), x, create_graph=True)
        return torch.stack([slope[:, 1], -slope[:, 0]], 1)


# --- fields, operators, sequences ---


@stands_for("Fourier operator", (6, 2))
class FourierOperator(Parts):
    """FNO: complex weights of a few modes, kept as pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__(modes=normal(2, 2, 2, 2), beside=nn.Linear(2, 2), out=nn.Linear(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        low = torch.fft.rfft(x, dim=1)[:, :2]
        turned = torch.einsum("bki,kio->bko", low, torch.view_as_complex(self.modes))
        h = torch.fft.irfft(F.pad(turned, (0, 0, 0, 2)), n=6, dim=1) + self.beside(x)
        return self.out(F.gelu(h))[:, ::2, 0]


@stands_for("operator by branch and trunk", (3,), (2, 1))
class DeepOperator(Parts):
    """DeepONet: functions by their values at sensors, and where to evaluate them."""

    def __init__(self) -> None:
        super().__init__(branch=nn.Linear(3, 3), trunk=nn.Linear(1, 3), bias=normal(1))

    def forward(self, u: Tensor, at: Tensor) -> Tensor:
        return torch.einsum("bk,bqk->bq", self.branch(u).tanh(), self.trunk(at).sin()) + self.bias


@stands_for("neural field", (3, 2))
class NeuralField(Parts):
    """Fourier features that are fixed, then a sine layer."""

    def __init__(self) -> None:
        super().__init__(sine=nn.Linear(4, 3), out=nn.Linear(3, 1))
        self.register_buffer("frequencies", normal(2, 2))

    def forward(self, at: Tensor) -> Tensor:
        phase = 2 * math.pi * at @ self.frequencies
        h = torch.cat([phase.sin(), phase.cos()], -1)
        return self.out((3 * self.sine(h)).sin()).squeeze(-1)


@stands_for("U-net", (1, 4, 4), ())
class UNet(Parts):
    """BatchNorm in eval mode, GroupNorm, a time embedding, up and down, and a skip."""

    def __init__(self) -> None:
        super().__init__(
            enter=nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()),
            down=nn.Conv2d(2, 2, 2, stride=2),
            norm=nn.GroupNorm(2, 2),
            time=nn.Linear(2, 2),
            up=nn.ConvTranspose2d(2, 2, 2, stride=2),
            leave=nn.Conv2d(4, 1, 1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.enter(x)
        when = self.time(torch.stack([t.sin(), t.cos()], 1))[:, :, None, None]
        h = F.silu(self.norm(self.down(skip)) + when)
        return F.avg_pool2d(self.leave(torch.cat([skip, self.up(h)], 1)), 2).flatten(1)


@stands_for("U-net in train mode", (1, 4, 4), (), within=COUPLED)
class TrainedUNet(UNet):
    """In eval mode, too, as where nobody tells its parts."""

    def train(self, mode: bool = True) -> TrainedUNet:
        return super().train()


@stands_for("spatial transformer", (1, 4, 4))
class SpatialTransformer(Parts):
    """Kornia: an image is warped by what is seen in it."""

    def __init__(self) -> None:
        super().__init__(see=nn.Linear(16, 6), out=nn.Linear(9, 2))

    def forward(self, x: Tensor) -> Tensor:
        still = torch.eye(2, 3, dtype=x.dtype)
        theta = 0.1 * self.see(x.flatten(1)).tanh().view(-1, 2, 3) + still
        grid = F.affine_grid(theta, [len(x), 1, 3, 3], align_corners=False)
        return self.out(F.grid_sample(x, grid, align_corners=False).flatten(1))


@stands_for("selective scan", (4, 2))
class SelectiveScan(Parts):
    """Mamba: a state that decays as the input says."""

    def __init__(self) -> None:
        super().__init__(enter=nn.Linear(2, 2), rate=normal(2, 2), B=nn.Linear(2, 2), D=normal(2))

    def forward(self, x: Tensor) -> Tensor:
        step = F.softplus(self.enter(x))
        decay = torch.exp(-step[..., None] * self.rate.exp())
        drive = (step * x)[..., None] * self.B(x)[:, :, None]
        state = torch.zeros_like(drive[:, 0])
        for a, u in zip(decay.unbind(1), drive.unbind(1), strict=True):
            state = a * state + u
        return state.sum(-1) + self.D * x[:, -1]


@stands_for("long convolution", (5, 2))
class LongConvolution(Parts):
    """S4: the answer to an impulse, convolved by FFT."""

    def __init__(self) -> None:
        super().__init__(log_rate=normal(2, 2), gain=normal(2, 2), out=nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        times = torch.arange(5, dtype=x.dtype)
        answer = torch.einsum(
            "dn,dnl->dl", self.gain, (-self.log_rate.exp()[..., None] * times).exp()
        )
        product = torch.fft.rfft(x.mT, n=10) * torch.fft.rfft(answer, n=10)
        return self.out(torch.fft.irfft(product, n=10)[..., :5].mT[:, -1].tanh())


@stands_for("parallel scan", (4, 2))
class ParallelScan(Parts):
    """minGRU in logarithms."""

    def __init__(self) -> None:
        super().__init__(gate=nn.Linear(2, 2), new=nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        kept = -F.softplus(gate).cumsum(1)
        return (kept + torch.logcumsumexp(-F.softplus(-gate) + self.new(x) - kept, 1)).exp()[:, -1]


class Spike(torch.autograd.Function):
    """A step whose slope is that of a soft one."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return slope / (1 + (math.pi * v).square())


class Neurons(Parts):
    def __init__(self) -> None:
        super().__init__(enter=nn.Linear(2, 3), leak=normal(3), out=nn.Linear(3, 2))


@stands_for("spiking net", (4, 2), looks=True)
class Spiking(Neurons):
    """snntorch: potentials are kept on the module, and reset where there was a spike, if any."""

    def forward(self, x: Tensor) -> Tensor:
        self.potential, total = torch.zeros((), dtype=x.dtype), 0
        for now in self.enter(x).unbind(1):
            self.potential = self.leak.sigmoid() * self.potential + 2 * now
            spikes = Spike.apply(self.potential - 1)
            if spikes.any():
                self.potential = torch.where(spikes > 0, 0.0, self.potential)
            total = total + spikes
        return self.out(total + self.potential)


@stands_for("spiking net by detached steps", (4, 2))
class SpikingByDetached(Neurons):
    """spikingjelly: the value of the step, the slope of a sigmoid; reset by subtraction."""

    def forward(self, x: Tensor) -> Tensor:
        v, total = 0, 0
        for now in self.enter(x).unbind(1):
            v = self.leak.sigmoid() * v + 2 * now
            soft = (4 * (v - 1)).sigmoid()
            spike = soft + ((v > 1).to(v) - soft).detach()
            v = v - spike.detach()
            total = total + spike
        return self.out(total + v)


# --- sets, kernels, experts ---


@stands_for(
    "deep set",
    inputs=lambda seed: (floats(B, 4, 2, seed=seed), integers(4, B, seed=seed) + 1),
)
class DeepSet(Parts):
    """The mean of as many points as there are."""

    def __init__(self) -> None:
        super().__init__(each=nn.Linear(2, 3), all=nn.Linear(3, 2))

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        is_there = (torch.arange(4) < count[:, None])[..., None]
        h = self.each(x).tanh().masked_fill(~is_there, 0).sum(1)
        return self.all(h / count[:, None])


@stands_for("attention pooling", (3, 2))
class AttentionPooling(Parts):
    """A query of its own, the same for all samples."""

    def __init__(self) -> None:
        super().__init__(
            query=normal(1, 1, 2), attention=nn.MultiheadAttention(2, 1, batch_first=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)
        return self.attention(query, x, x, need_weights=False)[0].squeeze(1)


@stands_for("deep kernel", (2,))
class DeepKernel(Parts):
    """GPyTorch: mean and variance of a Gaussian process of features, from a few points."""

    def __init__(self) -> None:
        super().__init__(
            features=nn.Linear(2, 2), points=normal(3, 2), values=normal(3), scale=normal()
        )

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return (-0.5 * (a[:, None] - b).square().sum(-1) / self.scale.exp()).exp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        between = self.kernel(self.points, self.points) + 0.1 * torch.eye(3, dtype=x.dtype)
        across = self.kernel(self.features(x).tanh(), self.points)
        root = torch.linalg.cholesky(between)
        solved = torch.linalg.solve_triangular(root, across.mT, upper=False)
        mean = across @ torch.cholesky_solve(self.values[:, None], root)
        return mean.squeeze(-1), 1 - solved.square().sum(0)


@stands_for("Kalman filter", (3, 2))
class Kalman(Parts):
    """A filter over time, of each series its own."""

    def __init__(self) -> None:
        super().__init__(A=normal(2, 2), log_noise=normal(2), start=normal(2))

    def forward(self, z: Tensor) -> Tensor:
        identity = torch.eye(2, dtype=z.dtype)
        m, P = self.start.expand(len(z), -1), identity.expand(len(z), -1, -1)
        for now in z.unbind(1):
            m, P = m @ self.A.mT, self.A @ P @ self.A.mT + 0.1 * identity
            gain = torch.linalg.solve(P + self.log_noise.exp().diag(), P).mT
            m, P = m + (gain @ (now - m)[..., None]).squeeze(-1), (identity - gain) @ P
        return m


@stands_for("kinematic chain", (3,))
class Chain(Parts):
    """pytorch_kinematics: joints turn, links have lengths."""

    def __init__(self) -> None:
        super().__init__(lengths=normal(3, 2), offsets=normal(3))

    def forward(self, angles: Tensor) -> Tensor:
        at, turn = angles.new_zeros(len(angles), 2), torch.eye(2, dtype=angles.dtype)
        for i, angle in enumerate((angles + self.offsets).unbind(1)):
            s, c = angle.sin(), angle.cos()
            turn = turn @ torch.stack([c, -s, s, c], -1).view(-1, 2, 2)
            at = at + turn @ self.lengths[i]
        return at


@stands_for("optimal transport", (3, 2))
class Transport(Parts):
    """Sinkhorn's iterations against points that are learned."""

    def __init__(self) -> None:
        super().__init__(points=normal(3, 2), weights=normal(3))

    def forward(self, x: Tensor) -> Tensor:
        cost = (x[:, :, None] - self.points).square().sum(-1)
        f, g = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
        for _ in range(3):
            f = -(g[:, None] - cost).logsumexp(2)
            g = self.weights.log_softmax(0) - (f[:, :, None] - cost).logsumexp(1)
        return ((f[:, :, None] + g[:, None] - cost).exp() * cost).sum(2)


@stands_for("spline layer", (2,))
class SplineLayer(Parts):
    """KAN: B-splines of each input, by Cox and de Boor."""

    def __init__(self) -> None:
        super().__init__(coefficients=normal(2, 2, 4), base=nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        knots = torch.linspace(-3, 3, 7, dtype=x.dtype)
        at = x.tanh().mul(2)[..., None]
        basis = ((at >= knots[:-1]) & (at < knots[1:])).to(x.dtype)
        for k in (1, 2):
            left = (at - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1])
            right = (knots[k + 1 :] - at) / (knots[k + 1 :] - knots[1:-k])
            basis = left * basis[..., :-1] + right * basis[..., 1:]
        return torch.einsum("bik,iok->bo", basis, self.coefficients) + self.base(F.silu(x))


@stands_for("hypernetwork", (2,), (3, 2))
class Hyper(Parts):
    """The weights of a layer are the outputs of another."""

    def __init__(self) -> None:
        super().__init__(weights=nn.Linear(2, 6), out=nn.Linear(3, 1))

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        return self.out(torch.bmm(x, self.weights(context).view(-1, 2, 3)).sin()).squeeze(-1)


@stands_for("codebook", (4,))
class Codebook(Parts):
    """VQ-VAE: the nearest entry, with the slope of what it stands for."""

    def __init__(self) -> None:
        super().__init__(encode=nn.Linear(4, 2), entries=normal(3, 2), decode=nn.Linear(2, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        chosen = F.embedding(torch.cdist(z, self.entries).argmin(1), self.entries)
        return self.decode(z + (chosen - z).detach()), (chosen - z.detach()).square().sum(1)


class Experts(Parts):
    def __init__(self) -> None:
        super().__init__(gate=nn.Linear(2, 3), weight=normal(3, 2, 2), bias=normal(3, 2))


@stands_for("experts whose weights are gathered", (2,))
class GatheredWeights(Experts):
    """The two best of three, by topk."""

    def forward(self, x: Tensor) -> Tensor:
        best, number = self.gate(x).topk(2, -1)
        h = torch.einsum("bkoi,bi->bko", self.weight[number], x) + self.bias[number]
        return (best.softmax(-1)[..., None] * h.tanh()).sum(1)


@stands_for("experts that gather their samples", (2,), looks=True)
class GatheredSamples(Experts):
    """Each expert takes those that want it most, and none where there are none."""

    def forward(self, x: Tensor) -> Tensor:
        chance, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        best, number = chance.max(-1)
        for e in range(3):
            (chosen,) = torch.where(number == e)
            if len(chosen):
                h = F.linear(x[chosen], self.weight[e], self.bias[e]).tanh()
                out = out.index_add(0, chosen, best[chosen, None] * h)
        return out


@stands_for("experts, samples sorted by them", (2,), looks=True)
class SortedSamples(Experts):
    """Samples in the order of their experts, one piece of the batch for each, and back again."""

    def forward(self, x: Tensor) -> Tensor:
        number = self.gate(x).argmax(-1)
        order = number.argsort(stable=True)
        pieces = x[order].split(torch.bincount(number, minlength=3).tolist())
        each = zip(pieces, self.weight, self.bias, strict=True)
        h = torch.cat([F.linear(p, w, b).tanh() for p, w, b in each])
        return h[order.argsort()]


@stands_for("experts with places for two samples", (2,), within=COUPLED)
class Places(Experts):
    """Who comes third to an expert gets nothing."""

    def forward(self, x: Tensor) -> Tensor:
        wanted = F.one_hot(self.gate(x).argmax(-1), 3)
        kept = wanted * (wanted.cumsum(0) <= 1)
        h = torch.einsum("eoi,bi->beo", self.weight, x) + self.bias
        return (kept.to(x)[..., None] * h.tanh()).sum(1)


@stands_for("tokens sorted and pruned", (4, 2), looks=True)
class Pruned(Parts):
    """The best two tokens of each sample, in the order of their scores."""

    def __init__(self) -> None:
        super().__init__(score=nn.Linear(2, 1), out=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        score, order = self.score(x).squeeze(-1).sort(-1, descending=True)
        kept = x.gather(1, order[:, :2, None].expand(-1, -1, 2))
        return self.out((kept * score[:, :2, None].sigmoid()).flatten(1)).tanh()


@stands_for("halting", (2,), looks=True)
class Halting(Parts):
    """Adaptive computation time: samples that are done leave the batch, until it is empty."""

    def __init__(self) -> None:
        super().__init__(step=nn.Linear(2, 2), halt=nn.Linear(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        out, rest = torch.zeros_like(x), torch.arange(len(x))
        for number in range(4):
            x = x + self.step(x).sin()
            done = (self.halt(x).squeeze(-1) > 0) | (number == 3)
            out = out.index_add(0, rest[done], x[done])
            rest, x = rest[~done], x[~done]
            if not len(rest):
                break
        return out


# --- ways to go through a batch ---


class Layers(Parts):
    def __init__(self) -> None:
        super().__init__(enter=nn.Linear(2, 3), leave=nn.Linear(3, 2), token=normal(1, 1, 2))

    def one(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).tanh() + self.token.sum())


@stands_for("samples in a loop", (3, 2))
class InALoop(Layers):
    """Each sample on its own, then stacked, as where graphs differ in size."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one(sample).sum(0).sin() for sample in x])


@stands_for("pieces of the batch", (3, 2))
class InPieces(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(piece).sum(1) for piece in x.split(3)])


@stands_for("vmap inside", (3, 2))
class VmapInside(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.one)(x).sum(1).sin()


@stands_for("Jacobian inside", (2,))
class JacobianInside(Layers):
    """Volume changes: the determinant of each sample's Jacobian."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), torch.vmap(torch.func.jacrev(self.one))(x).det()


@stands_for("NumPy inside", (3, 2), looks=True)
class NumpyInside(Layers):
    """Scaled by what NumPy says of each sample."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.from_numpy(x.detach().abs().numpy().max((1, 2)))
        return self.one(x / scale[:, None, None]).sum(1)


@stands_for("states written in place", (3, 2))
class WrittenInPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        states, state = x.new_zeros(len(x), 3, 2), x.new_zeros(len(x), 2)
        for t in range(3):
            state = self.one(state + x[:, t]).sin()
            states[:, t] = state
        states *= x
        return states.sum(1)


@stands_for("steps and states", (3, 2))
class StepsAndStates(Parts):
    """The samples are in front of the steps, and behind the layers of the states."""

    def __init__(self) -> None:
        super().__init__(layer=nn.LSTM(2, 2, 2, batch_first=True), head=nn.Linear(2, 2))

    def forward(self, x: Tensor) -> dict[str, Any]:
        steps, states = self.layer(x)
        return {"out": self.head(steps).tanh(), "states": states}


@stands_for("queries of every layer", (3, 2))
class EveryLayer(Layers):
    """As detectors stack what their layers say."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        return torch.stack([first, self.one(first)])


@stands_for("a token before the others", (3, 2))
class ClassToken(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        weights = (h @ h.mT).softmax(-1)
        return self.leave(self.enter(weights @ h).tanh())[:, 0]


@stands_for("tokens in front of the batch", (B, 2))
class TokensFirst(Layers):
    """As recurrent nets and attention want them by default; as many as there are samples."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1).contiguous()
        h = self.enter(h.view(-1, 2)).tanh().view(B, -1, 3)
        return self.leave(h.cumsum(0)[1:].sin()).sum(0)


def ordered(seed: int) -> tuple[Tensor]:
    """By size at first, later in any order."""
    x = floats(B, 2, seed=seed)
    return (x[x.norm(dim=1).argsort()] if seed == 1 else x,)


@stands_for("samples parted by a mask", inputs=ordered, looks=True)
class Parted(Layers):
    """Those of which something is true first, all by the same layer."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, 0] > 0
        h = self.one(torch.cat([x[mask], x[~mask]])).sin()
        out = torch.empty_like(h)
        out[mask], out[~mask] = h.split([int(mask.sum()), int((~mask).sum())])
        return out


def ragged(seed: int) -> tuple[Tensor, Tensor]:
    """Samples with 2, 2, 1 and 3 nodes, at first in this order."""
    counts = torch.tensor([2, 2, 1, 3])
    return floats(B, 3, 2, seed=seed), counts.roll(seed - 1)


@stands_for("graphs of several sizes", inputs=ragged, looks=True)
class Ragged(Layers):
    """The nodes of all in one row, as many as there are."""

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        graph = torch.arange(len(x)).repeat_interleave(count)
        nodes = torch.cat([one[:n] for one, n in zip(x, count.tolist(), strict=True)])
        return x.new_zeros(len(x), 2).index_add(0, graph, self.one(nodes).sin())


@stands_for("packed sequences", inputs=ragged, looks=True)
class Packed(Parts):
    """Time steps of all sequences that are long enough, the longest sequence first."""

    def __init__(self) -> None:
        super().__init__(gru=nn.GRU(2, 2, batch_first=True), out=nn.Linear(2, 2))

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, count, batch_first=True, enforce_sorted=False)
        return self.out(self.gru(packed)[1][0]).sin()


@stands_for("an expert for each sample, in a loop", inputs=ordered, looks=True)
class ExpertsInALoop(Parts):
    def __init__(self) -> None:
        super().__init__(gate=nn.Linear(2, 2), first=nn.Linear(2, 2), second=nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        experts, gates = (self.first, self.second), self.gate(x).softmax(1)
        chosen = gates.argmax(1).tolist()
        each = [gates[n, e] * experts[e](x[n]).tanh() for n, e in enumerate(chosen)]
        return torch.stack(each)


@stands_for("samples backwards", (2,))
class Backwards(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.one(x.flip(0)).sin().flip(0)


@stands_for("the last two in each other's place", (2,))
class LastTwo(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(torch.cat([x[:-2], x[-1:], x[-2:-1]])) if len(x) > 1 else self.one(x)
        return torch.cat([h[:-2], h[-1:], h[-2:-1]]) if len(x) > 1 else h


@stands_for("a row for each place in the batch", (2,), within=COUPLED)
class PlaceInBatch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * (1 + torch.arange(len(x)))[:, None]


@stands_for("samples in the order of their size", inputs=ordered, looks=True, within=COUPLED)
class BySize(Layers):
    """As packed sequences are, and back again: sums over samples are rounded in another way."""

    def forward(self, x: Tensor) -> Tensor:
        order = x.norm(dim=1).argsort()
        return self.one(x[order])[order.argsort()]


@stands_for("an order made by Python", inputs=ordered, looks=True, within=COUPLED)
class PythonsOrder(Layers):
    """What Python reads of the samples says in which order a layer gets them."""

    def forward(self, x: Tensor) -> Tensor:
        order = sorted(range(len(x)), key=lambda n: x[n].norm().item())
        h = self.one(torch.stack([x[n] for n in order])).sin()
        return torch.stack([h[order.index(n)] for n in range(len(x))])


def growing(seed: int) -> tuple[Tensor]:
    """Small and alike at first, so that all samples take as many steps; later they are not."""
    return (floats(B, 2, seed=seed) * (0.01 if seed < 3 else 3.0),)


@stands_for("fixed point", inputs=growing, looks=True, within=COUPLED)
class FixedPoint(Parts):
    """Equilibrium net: iterates until the worst sample has come to rest."""

    def __init__(self) -> None:
        super().__init__(enter=nn.Linear(2, 2), inner=0.3 * normal(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.enter(x), torch.zeros_like(x)
        for _ in range(20):
            new = (z @ self.inner.mT + u).tanh()
            if (new - z).abs().max() < 1e-2:
                break
            z = new
        return new


stands_for("steps for the worst sample", inputs=growing, looks=True, within=COUPLED)(CommonSteps)
