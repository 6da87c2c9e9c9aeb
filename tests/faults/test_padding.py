"""Lookups whose gradient is not that of any lookup: padding, and rows counted by frequency."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jacfunc
from tests.truth.oracles import looped_jacobian

TABLES = torch.linspace(-2.0, 2.0, 30, dtype=torch.float64).sin().view(3, 5, 2)
INDEX = torch.tensor([[0, 3, 1], [3, 3, 2], [4, 0, 3]])

LOOKUPS = {
    "padding": lambda w, i: F.embedding(i, w, padding_idx=3),
    "padding from the end": lambda w, i: F.embedding(i, w, padding_idx=-2),
    "by name": lambda w, i: F.embedding(input=i, weight=w, padding_idx=3),
    "computed table": lambda w, i: F.embedding(i, 2 * w, padding_idx=3),
    "below": lambda w, i: torch.embedding(w, i, 3),
    "below by name": lambda w, i: torch.embedding(weight=w, indices=i, padding_idx=3),
    "overload": lambda w, i: torch.ops.aten.embedding.default(w, i, 3),
    "frequency": lambda w, i: F.embedding(i, w, scale_grad_by_freq=True),
    "both": lambda w, i: F.embedding(i, w, padding_idx=3, scale_grad_by_freq=True),
    "bag": lambda w, i: F.embedding_bag(i[None], w, padding_idx=3, mode="sum")[0],
    "bag of means": lambda w, i: F.embedding_bag(i[None], w, padding_idx=3)[0],
}
EVERY = pytest.mark.parametrize("name", LOOKUPS)
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def squared(name):
    return lambda w, i: LOOKUPS[name](w, i).square()


def by_sample(func, tables):
    """``[B, *out, B, V, D]``: a loop over samples, and autograd's own rows."""
    return looped_jacobian(
        lambda tables: torch.stack([func(w, i) for w, i in zip(tables, INDEX, strict=True)]),
        (tables,),
    )


@EVERY
@pytest.mark.parametrize("vmap", [jacfunc.vmap, torch.vmap])
@pytest.mark.parametrize("strategy", ["reverse", "looped", "auto"])
def test_derivatives_of_vmapped_lookups(name, vmap, strategy):
    func = squared(name)
    actual = jacfunc.jacobian(lambda w: vmap(func)(w, INDEX), strategy=strategy)(TABLES)
    torch.testing.assert_close(actual, by_sample(func, TABLES))


@EVERY
def test_backward_through_our_vmap(name):
    func, tables = squared(name), TABLES.clone().requires_grad_()
    expected = by_sample(func, TABLES).flatten(0, -4).sum(0)
    for dim in (0, 1, 2):
        out = jacfunc.vmap(func, (dim, 0))(tables.movedim(0, dim), INDEX)
        (actual,) = torch.autograd.grad(out.sum(), tables)
        torch.testing.assert_close(actual, expected)


@EVERY
def test_torch_differentiates_our_vmap(name):
    func = squared(name)
    actual = torch.func.jacrev(lambda w: jacfunc.vmap(func)(w, INDEX))(TABLES)
    torch.testing.assert_close(actual, by_sample(func, TABLES))


@EVERY
def test_one_table_for_all_samples(name):
    func, table = squared(name), TABLES[0]
    expected = torch.stack([looped_jacobian(lambda w, i=i: func(w, i), (table,)) for i in INDEX])
    actual = jacfunc.vmap(jacfunc.jacrev(func), (None, 0))(table, INDEX)
    torch.testing.assert_close(actual, expected)
    actual = jacfunc.jacrev(lambda w: jacfunc.vmap(func, (None, 0))(w, INDEX))(table)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", [name for name in LOOKUPS if not name.startswith("bag")])
def test_second_derivatives(name):
    func = squared(name)
    hessian = jacfunc.hessian(lambda w: jacfunc.vmap(func)(w.sin(), INDEX).pow(2).sum())(TABLES)

    def loss(w):
        w = w.sin()
        return torch.stack([func(t, i) for t, i in zip(w, INDEX, strict=True)]).pow(2).sum()

    w = TABLES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(w), w, create_graph=True)
    rows = [torch.autograd.grad(g, w, retain_graph=True)[0] for g in gradient.flatten()]
    torch.testing.assert_close(hessian, torch.stack(rows).view(hessian.shape))


@pytest.mark.parametrize("name", ["padding", "below", "below by name", "overload", "frequency"])
def test_forward_mode_refuses_what_changes_the_gradient_alone(name):
    with pytest.raises(NotImplementedError, match="embedding is wrong here"):
        jacfunc.jacfwd(lambda w: LOOKUPS[name](w, INDEX))(TABLES[0])


class Tokens(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.table = nn.Embedding(5, 2, padding_idx=3).double()
        with torch.no_grad():
            self.table.weight.copy_(TABLES[0])

    def forward(self, index):
        if self.kind == "computed":
            return F.embedding(index, self.table.weight.sin(), padding_idx=3).sum(1).tanh()
        if self.kind == "tied":
            return self.table(index).sum(1) @ self.table.weight.T
        return self.table(index).sum(1).tanh()


@pytest.mark.parametrize("kind", ["plain", "computed", "tied"])
def test_every_door_of_a_module(kind):
    module = Tokens(kind)
    rows = [[*module(i[None])[0]] for i in INDEX]
    weight = module.table.weight
    expected = torch.stack(
        [
            torch.stack([torch.autograd.grad(o, weight, retain_graph=True)[0] for o in row])
            for row in rows
        ]
    )
    name = "table.weight"
    for strategy in ("auto", "reverse", "looped", "structured"):
        jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)(INDEX)
        torch.testing.assert_close(jac[name], expected)
    streamed = dict(jacfunc.stream_jacobian(module, per_sample=True)(INDEX))
    torch.testing.assert_close(streamed[name], expected)
    by_rows = jacfunc.stream_jacobian(module, "rows", per_sample=True)(INDEX)
    torch.testing.assert_close(torch.cat([block[name] for _, block in by_rows], 1), expected)
    flat = expected.flatten(2)
    kernel = jacfunc.ntk(module, None, INDEX)
    torch.testing.assert_close(kernel, torch.einsum("aip,bjp->abij", flat, flat))
    out = module(INDEX).detach()

    def loss(outputs, targets):
        return (outputs - targets).square().sum() / 2

    norms = jacfunc.gradient_norms(module, loss)(INDEX, torch.zeros_like(out))
    torch.testing.assert_close(norms, torch.einsum("bi,bip->bp", out, flat).norm(dim=1))
    diagonal = jacfunc.ggn(module, loss)(INDEX, torch.zeros_like(out)).diagonal()[name]
    torch.testing.assert_close(diagonal, expected.square().sum((0, 1)))
