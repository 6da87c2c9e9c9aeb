"""Infinite derivatives of one output spoil nothing of another: 0 · ∞ is nan."""

import pytest
import torch
from torch import nn

import jacfunc
from jacfunc import Forward, Looped
from tests.truth.oracles import looped_jacobian

X = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)


def outputs(x):
    """Finite beside an infinite derivative, and beside one that is not a number."""
    return {"sum": x.sum(), "root": x.sqrt(), "cube": x**3, "mean": (x - 1).sqrt().mean()}


def rows(func, x):
    """The plain loop over one output alone."""
    return {name: looped_jacobian(lambda x, name=name: func(x)[name], (x,)) for name in func(x)}


def assert_same(actual, expected):
    for name, want in expected.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped", "structured", "autotune"])
def test_rows_go_through_their_output_alone(strategy):
    assert_same(jacfunc.jacobian(outputs, strategy=strategy)(X), rows(outputs, X))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, None])
def test_chunks_end_where_an_output_ends(chunk_size):
    assert_same(jacfunc.jacrev(outputs, chunk_size=chunk_size)(X), rows(outputs, X))


def test_chunks_within_a_budget():
    wide = X.repeat(40)
    assert_same(jacfunc.jacrev(outputs, memory="1 MB")(wide), rows(outputs, wide))


@pytest.mark.parametrize("vmap", [jacfunc.vmap, torch.vmap])
def test_inside_vmap(vmap):
    batch = torch.stack([X, X + 2])
    expected = [rows(outputs, x) for x in batch]
    stacked = {name: torch.stack([one[name] for one in expected]) for name in expected[0]}
    assert_same(vmap(jacfunc.jacrev(outputs))(batch), stacked)


def test_hessians_by_blocks():
    """The gradient in one argument has an infinite derivative, that in the other has none."""

    def func(a, b):
        return a.pow(1.5).sum() + (b**3).sum()

    a, b = torch.tensor([0.0, 1.0]).double(), torch.tensor([2.0]).double()
    for strategy in ("reverse", "looped", "auto"):
        (_, upper), (lower, last) = jacfunc.hessian(func, (0, 1), strategy=strategy)(a, b)
        assert not upper.any()
        assert not lower.any()
        torch.testing.assert_close(last, torch.tensor([[12.0]]).double())


FORWARD = [Forward(), Forward(chunk_size=1), Looped("columns")]


@pytest.mark.parametrize("strategy", FORWARD)
def test_forward_mode_refuses_nan(strategy):
    """Nobody can tell there whose nan it is."""
    with pytest.raises(NotImplementedError, match=r"jacobian: .*forward mode gives nan"):
        jacfunc.jacobian(outputs, strategy=strategy)(X)


@pytest.mark.parametrize("vmap", [jacfunc.vmap, torch.vmap])
def test_forward_mode_refuses_nan_inside_vmap(vmap):
    with pytest.raises(NotImplementedError, match=r"jacfwd: .*forward mode gives nan"):
        vmap(jacfunc.jacfwd(outputs))(torch.stack([X, X + 2]))


def test_auto_goes_on_in_reverse():
    """From forward mode, which a tall Jacobian begins with."""

    def tall(x):
        return (x.expand(500) * torch.arange(500.0).double()).sin(), x.sqrt() * x

    x = torch.zeros(1, dtype=torch.float64)
    actual = jacfunc.jacobian(tall)(x)
    assert_same(dict(enumerate(actual)), rows(tall_by_number(tall), x))


def tall_by_number(func):
    return lambda x: dict(enumerate(func(x)))


def test_infinities_of_both_signs_are_no_nan():
    def func(x):
        return torch.stack([x.sqrt(), -x.sqrt()])

    expected = torch.tensor([torch.inf, -torch.inf]).double()
    assert jacfunc.jacfwd(func)(X[0]).tolist() == expected.tolist()


class Rooted(nn.Module):
    """One output has an infinite derivative in all parameters; a loss need not look at it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()
        self.gate = nn.Parameter(torch.tensor(0.7).double())

    def forward(self, x):
        h = self.layer(x)
        return {"good": h.tanh() * self.gate, "bad": (h - h.detach()).sqrt() * self.gate}


BATCH = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(4, 3)


def rows_of_samples(module, key):
    """``[B, M, P]`` by plain loops."""
    found = []
    for x in BATCH:
        out = module(x[None])[key][0]
        grads = [
            torch.autograd.grad(o, list(module.parameters()), retain_graph=True, allow_unused=True)
            for o in out
        ]
        found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]))
    return torch.stack(found)


def flat(blocks):
    return torch.cat([block.reshape(*block.shape[:2], -1) for block in blocks], -1)


def test_every_door_of_a_module():
    module = Rooted()
    good, bad = rows_of_samples(module, "good"), rows_of_samples(module, "bad")
    assert bad.isnan().any()
    names = [name for name, _ in module.named_parameters()]
    for strategy in ("auto", "reverse", "looped", "structured"):
        jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)(BATCH)
        torch.testing.assert_close(flat(jac["good"][name] for name in names), good)
        matrix = jacfunc.module_jacobian(module, per_sample=True, flat=True, strategy=strategy)
        torch.testing.assert_close(matrix(BATCH), torch.cat((good, bad), 1), equal_nan=True)
    blocks = dict(jacfunc.stream_jacobian(module, per_sample=True)(BATCH))
    torch.testing.assert_close(flat(blocks[name]["good"] for name in names), good)
    streamed = jacfunc.stream_jacobian(module, "rows", per_sample=True, chunk_size=3)(BATCH)
    every = torch.cat([flat(block.values()) for _, block in streamed], 1)
    torch.testing.assert_close(every, torch.cat((good, bad), 1), equal_nan=True)
    kernel = jacfunc.ntk(module, None, BATCH)["good"]
    torch.testing.assert_close(kernel, torch.einsum("aip,bjp->abij", good, good))
    assert jacfunc.random_projection(module, 8)(BATCH)["good"].isfinite().all()


def test_a_loss_of_some_outputs():
    module = Rooted()
    good = rows_of_samples(module, "good")
    out = module(BATCH)["good"].detach()

    def loss(outputs, targets):
        return outputs["good"].square().sum() / 2

    norms = jacfunc.gradient_norms(module, loss)(BATCH, None)
    torch.testing.assert_close(norms, torch.einsum("bi,bip->bp", out, good).norm(dim=1))
    G = jacfunc.ggn(module, loss)(BATCH, None)
    diagonal = torch.cat([block.flatten() for block in G.diagonal().values()])
    torch.testing.assert_close(diagonal, good.square().sum((0, 1)))
    ones = {name: torch.ones_like(p) for name, p in module.named_parameters()}
    product = torch.cat([block.flatten() for block in (G @ ones).values()])
    torch.testing.assert_close(product, torch.einsum("bip,biq->p", good, good))
