"""Parameters that are read by strides, or do not lie in a row, or have no dimension."""

import pytest
import torch
from torch import nn

import jacfunc

BUFFER = torch.linspace(-3.0, 3.0, 40, dtype=torch.float64).sin()
LAID = {
    "in a row": BUFFER[:6].clone().view(3, 2),
    "turned": BUFFER[:6].clone().view(2, 3).T,
    "with gaps": BUFFER[:12].view(3, 4)[:, ::2],
    "behind others": BUFFER[5:11].view(3, 2),
    "expanded": BUFFER[:2].clone().expand(3, 2),
}
READ = {
    "as_strided": lambda w: w.as_strided((3, 2), (1, 1)),
    "with an offset": lambda w: torch.as_strided(w, (3, 1), (1, 1), 1),
    "by its own strides": lambda w: w.as_strided(tuple(w.shape), w.stride(), w.storage_offset()),
    "overload": lambda w: torch.ops.aten.as_strided.default(w, [3, 2], [1, 1]),
    "copy": lambda w: torch.as_strided_copy(w, (3, 2), (1, 1)),
    "of what is computed": lambda w: w.exp().as_strided((3, 2), (1, 1)),
    "view": lambda w: w.view(6).view(3, 2) if w.is_contiguous() else w,
    "windows": lambda w: w.unfold(0, 2, 1).sum(-1).sum() * w,
}
X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).cos().view(4, 3)


class Reading(nn.Module):
    def __init__(self, weight, read):
        super().__init__()
        self.weight = nn.Parameter(weight.detach())
        self.read = read

    def forward(self, x):
        return (x @ self.read(self.weight)).tanh()


def half(outputs, targets):
    return outputs.square().sum() / 2


def by_loops(module):
    """``[B, M, *param]``."""
    return torch.stack(
        [
            torch.stack(
                [
                    torch.autograd.grad(o, module.weight, retain_graph=True)[0]
                    for o in module(x[None])[0]
                ]
            )
            for x in X
        ]
    )


def doors(module):
    """Every door's answer, as a function, with the Jacobian's part in it."""
    read = module.read
    weight = module.weight.detach()
    for strategy in ("auto", "reverse", "forward", "looped", "structured"):
        for per_sample in (True, False):
            jac = jacfunc.module_jacobian(module, per_sample=per_sample, strategy=strategy)
            yield f"{strategy} {per_sample}", lambda jac=jac: jac(X)["weight"], lambda J: J
    for by in ("params", "samples", "rows"):
        stream = jacfunc.stream_jacobian(module, by, per_sample=True)

        def whole(stream=stream, by=by):
            pieces = [piece for _, piece in stream(X)]
            if by == "params":
                return pieces[0]
            return torch.cat([piece["weight"] for piece in pieces], int(by == "rows"))

        yield f"stream {by}", whole, lambda J: J

    def kernel(J):
        return torch.einsum("aip,bjp->abij", J.flatten(2), J.flatten(2))

    def norms(J):
        return torch.einsum("bi,bip->bp", module(X), J.flatten(2)).norm(dim=1)

    yield "ntk", lambda: jacfunc.ntk(module, None, X), kernel
    yield "norms", lambda: jacfunc.gradient_norms(module, half)(X, None), norms
    yield (
        "diagonal",
        lambda: jacfunc.ggn(module, half)(X, None).diagonal()["weight"],
        lambda J: J.square().sum((0, 1)),
    )

    def func(w, x):
        return (x @ read(w)).tanh()

    yield "jacrev", lambda: jacfunc.jacrev(func)(weight, X), lambda J: J
    yield "jacfwd", lambda: jacfunc.jacfwd(func)(weight, X), lambda J: J
    yield (
        "vmap of jacrev",
        lambda: jacfunc.vmap(jacfunc.jacrev(func), (None, 0))(weight, X),
        lambda J: J,
    )
    yield (
        "jacrev of vmap",
        lambda: jacfunc.jacrev(lambda w: jacfunc.vmap(func, (None, 0))(w, X))(weight),
        lambda J: J,
    )


def answered(answer):
    """The answer, or what was said instead."""
    try:
        return answer()
    except NotImplementedError as refusal:
        return str(refusal)


def is_readable(laid, read):
    """Does plain autograd know what it means?"""
    return not (laid == "expanded" and read in ("as_strided", "with an offset", "overload", "copy"))


CASES = [(laid, read) for laid in LAID for read in READ if is_readable(laid, read)]


@pytest.mark.filterwarnings("ignore:Use of")
@pytest.mark.parametrize(("laid", "read"), CASES)
def test_every_door_is_right_or_refuses(laid, read):
    module = Reading(LAID[laid], READ[read])
    J = by_loops(module)
    num_right = 0
    for name, answer, expected in doors(module):
        actual = answered(answer)
        if isinstance(actual, str):
            assert "memory by strides" in actual, name
            assert actual.split(":")[0] in dir(jacfunc), name
            continue
        torch.testing.assert_close(actual, expected(J), msg=name)
        num_right += 1
    assert num_right or laid != "in a row"


@pytest.mark.parametrize("read", ["view", "windows"])
@pytest.mark.parametrize("laid", LAID)
def test_what_is_no_read_by_strides_is_not_refused(laid, read):
    module = Reading(LAID[laid], READ[read])
    J = by_loops(module)
    for name, answer, expected in doors(module):
        torch.testing.assert_close(answer(), expected(J), msg=name)


def test_auto_finds_a_way_where_a_sample_alone_is_right():
    module = Reading(LAID["in a row"], READ["as_strided"])
    actual = jacfunc.module_jacobian(module, per_sample=True)(X)["weight"]
    torch.testing.assert_close(actual, by_loops(module))


class Scaled(nn.Module):
    """Numbers that are no vectors: a temperature, a gate, one that is viewed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()
        self.scale = nn.Parameter(torch.tensor(0.5).double())
        self.gate = nn.Parameter(torch.tensor(0.0).double())
        self.viewed = nn.Parameter(torch.tensor(1.3).double())

    def forward(self, x):
        h = self.layer(x) * self.scale.exp() + self.viewed.view(1)
        return h + self.gate * h.tanh() * self.scale


def test_parameters_of_no_dimension():
    module, params = Scaled(), dict(Scaled().named_parameters())
    with torch.no_grad():
        out = module(X)
    J = torch.stack(
        [
            torch.stack(
                [
                    torch.cat(
                        [
                            g.flatten()
                            for g in torch.autograd.grad(
                                o, list(module.parameters()), retain_graph=True
                            )
                        ]
                    )
                    for o in module(x[None])[0]
                ]
            )
            for x in X
        ]
    )

    def flat(tree):
        return torch.cat([tree[name].flatten() for name in dict(module.named_parameters())])

    kernel = torch.einsum("aip,bjp->abij", J, J)
    torch.testing.assert_close(jacfunc.ntk(module, None, X), kernel)
    torch.testing.assert_close(jacfunc.ntk(module, None, X, chunk_size=3), kernel)
    torch.testing.assert_close(jacfunc.ntk(module, None, X, X[:2]), kernel[:, :2])
    traced = torch.einsum("abii->ab", kernel)
    torch.testing.assert_close(jacfunc.ntk(module, None, X, trace_axes=0), traced)
    for strategy in ("auto", "reverse", "forward", "looped", "structured"):
        jac = jacfunc.module_jacobian(module, per_sample=True, flat=True, strategy=strategy)
        torch.testing.assert_close(jac(X), J)
        torch.testing.assert_close(jac(X.flip(0)), J.flip(0))
    norms = jacfunc.gradient_norms(module, half)(X, None)
    torch.testing.assert_close(norms, torch.einsum("bi,bip->bp", out, J).norm(dim=1))
    G = jacfunc.ggn(module, half)(X, None)
    matrix = torch.einsum("bip,biq->pq", J, J)
    torch.testing.assert_close(G.matrix(), matrix)
    torch.testing.assert_close(flat(G.diagonal()), matrix.diagonal())
    torch.testing.assert_close(
        flat(G @ {n: torch.ones_like(p) for n, p in params.items()}), matrix.sum(1)
    )
    torch.testing.assert_close(G.blocks()["gate"], matrix[1:2, 1:2])
    assert jacfunc.random_projection(module, 8)(X).isfinite().all()


def test_gramians_in_a_number():
    x = X[0]
    actual = jacfunc.gram(lambda s: s.sin() * x)(torch.tensor(0.3).double())
    expected = torch.outer(x, x) * torch.tensor(0.3).double().cos() ** 2
    torch.testing.assert_close(actual, expected)
    kernel = jacfunc.ntk(lambda p, x: p["t"] * x, {"t": torch.tensor(2.0).double()}, X)
    torch.testing.assert_close(kernel, torch.einsum("ai,bj->abij", X, X))
