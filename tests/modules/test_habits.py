"""What people's modules do inside ``forward``, in every door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import jacfunc
from tests.truth.batches import DOORS, Call

EVERY_DOOR = pytest.mark.parametrize("door", DOORS)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


class Block(nn.Module):
    """A block of a residual network, as torchvision has them: every activation is in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, 2, 3, padding=1, bias=False) for c in (1, 2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(3))
        self.down, self.relu = nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(inplace=True)
        for norm in self.norms:
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norms[0](self.first(x)))
        out = self.norms[1](self.second(out))
        out += self.norms[2](self.down(x))
        return self.relu(out).flatten(1)


class Einsum(nn.Module):
    """Activations in place behind products that give views: einsum, tensordot, linear in 3-d."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))
        self.third = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.elu(torch.einsum("bi,ij->bj", x, self.first), inplace=True)
        hidden = torch.tensordot(hidden, self.second, 1).tanh_()
        return F.silu(self.third(hidden[:, None]), inplace=True).squeeze(1)


IN_PLACE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual block": (Block, (2, 1, 3, 3)),
    "einsum": (Einsum, (3, 3)),
    "group norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.ELU(inplace=True)),
        (3, 3),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.LeakyReLU(inplace=True)),
        (3, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(1, 2, 2), nn.Hardswish(inplace=True)),
        (2, 1, 3),
    ),
}


@EVERY_DOOR
@pytest.mark.parametrize("name", IN_PLACE)
def test_activations_in_place(name: str, door: str) -> None:
    make, shape = IN_PLACE[name]
    DOORS[door](Call(made(make), floats(*shape)))


class Adapted(nn.Module):
    """A layer with a low-rank adapter, which can be switched off as PEFT does it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(3, 2), nn.Linear(3, 1), nn.Linear(1, 2)
        self.is_off = False

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """In it the adapter is not used, and its parameters require no gradient."""
        self._switch(is_off=True)
        try:
            yield
        finally:
            self._switch(is_off=False)

    def _switch(self, is_off: bool) -> None:
        self.is_off = is_off
        for layer in (self.down, self.up):
            layer.requires_grad_(not is_off)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.is_off else self.base(x) + self.up(torch.tanh(self.down(x)))


class AgainstItself(Adapted):
    """With the adapter and without it, as losses of preference compare."""

    def forward(self, x: Tensor) -> Tensor:
        policy = super().forward(x)
        with self.disable_adapter():
            reference = super().forward(x)
        return policy - reference.square()


class WhileConstant(Adapted):
    """Uses parameters while they require no gradient; torch takes them for constants."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.up(torch.tanh(self.down(x)))
        self.down.requires_grad_(False)
        self.up.weight.requires_grad = False
        assert not self.down.weight.requires_grad
        assert not self.up.weight.requires_grad
        between = self.up(torch.sin(self.down(x)))
        self.down.requires_grad_(True)
        self.up.weight.requires_grad = True
        return before * between + self.base(self.down(x).expand(-1, 3))


@EVERY_DOOR
@pytest.mark.parametrize("kind", [AgainstItself, WhileConstant])
def test_adapters_that_are_switched_off_inside(kind: type[nn.Module], door: str) -> None:
    module = made(kind)
    DOORS[door](Call(module, floats(3, 3)))
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("strategy", ["auto", "forward", "reverse", "looped"])
def test_adapters_in_forward_mode(strategy: str) -> None:
    call = Call(made(WhileConstant), floats(3, 3))
    jac = jacfunc.module_jacobian(call.module, strategy=strategy)
    call.same(jac(call.x), call.whole)


@EVERY_DOOR
def test_adapters_that_are_switched_off_between_calls(door: str) -> None:
    module = made(Adapted)
    DOORS[door](Call(module, floats(3, 3)))
    module.is_off = True
    for _ in range(2):
        DOORS[door](Call(module, floats(3, 3)))
    module.is_off = False
    DOORS[door](Call(module, floats(3, 3)))


def test_only_what_is_left_on_is_differentiated() -> None:
    module = made(Adapted)
    with module.disable_adapter():
        jac = jacfunc.module_jacobian(module, per_sample=True)(floats(3, 3))
    assert list(jac) == ["base.weight", "base.bias"]
    assert list(jacfunc.module_jacobian(module)(floats(3, 3))) == list(
        dict(module.named_parameters())
    )


class WeightNormed(nn.Module):
    """Weight normalization by hand: ``g v / ‖v‖`` in elementary operations."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.params = dict(of.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        g, v, bias = (self.params[name] for name in _names_of(self.params))
        norm = v.square().flatten(1).sum(1).sqrt().reshape(-1, *(1,) * (v.dim() - 1))
        weight = v * (g / norm)
        return torch.tanh((F.linear if v.dim() == 2 else F.conv1d)(x, weight, bias))


def _names_of(params: dict[str, Any]) -> tuple[str, str, str]:
    """The names of the length, the direction and the bias, in the old and the new form."""
    ends = ("original0", "weight_g"), ("original1", "weight_v"), ("bias",)
    g, v, bias = (next(name for name in params if name.endswith(end)) for end in ends)
    return g, v, bias


def weight_normed(kind: str) -> nn.Module:
    layer = nn.Conv1d(1, 2, 2) if kind == "convolution" else nn.Linear(3, 2)
    if kind != "old":
        return nn.Sequential(parametrizations.weight_norm(layer), nn.Tanh())
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(layer), nn.Tanh())


@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped", "structured"])
@pytest.mark.parametrize("kind", ["new", "old", "convolution"])
def test_weight_norms_are_differentiated_twice(kind: str, strategy: str) -> None:
    """At every sample and every call: the first watched what later ones do."""
    module, x = (
        made(lambda: weight_normed(kind)),
        floats(3, 1, 3) if kind == "convolution" else None,
    )
    x = floats(3, 3) if x is None else x
    params, plain = tuple(module.parameters()), WeightNormed(module)
    names = [name for name, _ in module.named_parameters()]
    rows = torch.autograd.grad(plain(x).sum(), params, create_graph=True)
    want = torch.autograd.grad(sum(row.square().sum() for row in rows), params)
    jacobian = jacfunc.module_jacobian(
        module, per_sample=True, create_graph=True, strategy=strategy
    )
    for _ in range(3):
        sums = [jacobian(x)[name].sum(tuple(range(plain(x).dim()))) for name in names]
        for got, row in zip(sums, rows, strict=True):
            torch.testing.assert_close(got.detach(), row.detach())
        got = torch.autograd.grad(sum(row.square().sum() for row in sums), params)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["new", "old", "convolution"])
def test_weight_norms_in_forward_mode(kind: str) -> None:
    module = made(lambda: weight_normed(kind))
    call = Call(module, floats(3, 1, 3) if kind == "convolution" else floats(3, 3))
    jac = jacfunc.module_jacobian(module, strategy="forward")
    call.same(jac(call.x), call.whole)


class Checkpointed(nn.Module):
    """Activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(
            lambda h: torch.tanh(self.first(h)), x.sin(), use_reentrant=self.reentrant
        )
        return self.second(hidden)


class Residual(nn.Module):
    """A physics-informed network: its output, and the output's derivative in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.clone().requires_grad_()
            u = self.head(torch.tanh(self.body(x)))
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat((u, slope), 1)


@EVERY_DOOR
@pytest.mark.parametrize("kind", [Checkpointed, Residual])
def test_checkpoints_and_derivatives_inside(kind: type[nn.Module], door: str) -> None:
    x = floats(3, 2) if kind is Residual else floats(3, 3)
    DOORS[door](Call(made(kind), x))


class Doubled(TorchFunctionMode):
    """Linear layers return twice as much, as a mode that emulates hardware might let them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        return 2 * result if func is F.linear else result


@EVERY_DOOR
def test_modes_of_users_may_change_what_layers_return(door: str) -> None:
    module, x = (
        made(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))),
        floats(3, 3),
    )
    for mode in (nullcontext, Doubled, nullcontext):
        with mode():
            DOORS[door](Call(module, x))


@EVERY_DOOR
def test_checkpoints_in_inference_mode(door: str) -> None:
    call = Call(made(Checkpointed), floats(3, 3))
    for name in ("output", "whole", "each", "inputs"):  # what is expected, computed outside
        getattr(call, name)
    with torch.inference_mode():
        DOORS[door](call)


@EVERY_DOOR
def test_reentrant_checkpoints_are_refused(door: str) -> None:
    call = Call(made(lambda: Checkpointed(reentrant=True)), floats(3, 3))
    call.output = torch.zeros(3, 2).double()  # of which torch would warn
    with pytest.raises(NotImplementedError, match="reentrant"):
        DOORS[door](call)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Unflatten(1, (2, 4)))
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(*layers, attention, nn.Flatten(), nn.Linear(8, 2)).eval()


@EVERY_DOOR
def test_under_autocast(door: str) -> None:
    """Right to the rounding of bfloat16, beside loops in float32; blocks have the dtype of both."""
    x = floats(3, 4).float()
    call = Call(encoder(), x, tolerances={"rtol": 5e-2, "atol": 3e-2})
    exact = (call.output, call.whole, call.each, call.inputs)  # before autocast, and kept
    assert exact[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        DOORS[door](call)


def test_dtypes_under_autocast() -> None:
    module, x = encoder(), floats(3, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        for strategy in ("auto", "looped", "structured"):
            jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)(x)
            assert {block.dtype for block in jac.values()} == {torch.float32}


class CastInside(nn.Module):
    """Parts of it run in bfloat16, which neither its inputs nor its outputs tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = F.gelu(self.norm(self.first(x)))
        return self.last(hidden.float())


@pytest.mark.parametrize("seed", range(8))
def test_products_may_be_rounded_as_autocast_inside_rounds(seed: int) -> None:
    torch.manual_seed(seed)
    module, x = CastInside(), torch.randn(3, 3)
    call = Call(module, x)
    J = torch.cat([block.flatten(2) for block in call.whole.values()], 2).flatten(0, 1)
    v, u = {n: torch.randn_like(p) for n, p in call.params.items()}, torch.randn(3, 2)

    def flat(named: Any) -> Tensor:
        return torch.cat([block.flatten() for block in named.values()])

    operator = jacfunc.module_operator(module)(x)
    G = jacfunc.ggn(module, call.loss)(x, call.targets)
    near = {"rtol": 5e-2, "atol": 5e-2 * float(J.square().sum())}
    torch.testing.assert_close((operator @ v).flatten(), J @ flat(v), **near)
    torch.testing.assert_close(flat(operator.rmv(u)), u.flatten() @ J, **near)
    torch.testing.assert_close(flat(G @ v), J.T @ (J @ flat(v)), **near)
