"""Uses of parameters in products, views, attention and recurrent layers, against plain autograd."""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import jacfunc
from jacfunc._factored.parts import Part, rows, write
from jacfunc._factored.use import View
from jacfunc.layers._forms import Rows
from jacfunc.strategies._structured import Structured
from tests.truth.learned import learning


class Model(nn.Module):
    """Raw parameters of these shapes, and a function of ``(parameters, x)``."""

    def __init__(self, func, **shapes):
        super().__init__()
        self.func = func
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 2))

    def forward(self, x):
        return self.func(self, x)


class Around(nn.Module):
    """A layer, and how it is called."""

    def __init__(self, layer, func):
        super().__init__()
        self.layer, self.func = layer, func

    def forward(self, x):
        return self.func(self.layer, x)


class Encoder(nn.Module):
    """A block by hand, its heads by einsum or by matmul."""

    def __init__(self, by_einsum):
        super().__init__()
        self.by_einsum = by_einsum
        self.packed = nn.Linear(4, 12, bias=False)
        self.out = nn.Parameter(torch.randn(2, 2, 4) / 2)  # [heads, width, out]
        self.mlp = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))

    def forward(self, x):
        q, k, v = self.packed(x).unflatten(-1, (3, 2, 2)).unbind(-3)  # [B, T, heads, width]
        if self.by_einsum:
            scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
            heads = torch.einsum("bhts,bshd->bthd", scores, v)
            x = x + torch.einsum("bthd,hdo->bto", heads, self.out)
        else:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            heads = (q @ k.mT).softmax(-1) @ v
            x = x + (heads @ self.out).sum(1)
        return (x + self.mlp(x)).mean(1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        return F.linear(self.mix(self.table(tokens)).tanh(), self.table.weight).mean(1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


class Cells(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Learned(nn.Module):
    """The states before the first step are parameters."""

    def __init__(self):
        super().__init__()
        self.layer, self.first = nn.LSTM(4, 3, batch_first=True), nn.Parameter(torch.randn(3))

    def forward(self, x):
        first = self.first.expand(1, len(x), 3).contiguous()
        return self.layer(x, (first, first.sin()))[0]


class Mix(nn.Module):
    """Most of it at once."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(4, 3, batch_first=True, bidirectional=True)
        self.raw = nn.Parameter(torch.randn(3, 6))
        self.shared = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        states = self.lstm(self.encoder(x))[0]
        states = self.shared(self.shared(states).tanh() @ self.shared.weight.t())
        return self.scale * (states.mean(1) @ self.raw.T) / self.raw.norm()


def stacked(x):
    return torch.stack((x, x.sin()), 1)


def attention(func, **options):
    return lambda: Around(nn.MultiheadAttention(4, 2, batch_first=True, **options), func)


def recurrent(kind, **options):
    make = getattr(nn, kind)
    return lambda: Around(make(4, 3, batch_first=True, **options), lambda layer, x: layer(x)[0])


def raw(func, **shapes):
    return lambda: Model(func, **shapes)


SEQUENCE, ROW, TOKENS = (3, 5, 4), (3, 4), None
MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)
# makers, shapes of the inputs, and parameters that a rule need not cover
PRODUCTS = {
    "x @ W": (raw(lambda m, x: x @ m.w, w=(4, 3)), ROW),
    "x @ W of sequences": (raw(lambda m, x: x @ m.w, w=(4, 3)), SEQUENCE),
    "W @ x": (raw(lambda m, x: (m.w @ x.squeeze(0)).unsqueeze(0), w=(3, 4)), ROW),
    "W @ X": (raw(lambda m, x: m.w @ x, w=(3, 5)), SEQUENCE),
    "X @ w": (raw(lambda m, x: x @ m.w, w=(4,)), SEQUENCE),
    "w @ X": (raw(lambda m, x: m.w @ x, w=(5,)), SEQUENCE),
    "w @ x": (raw(lambda m, x: m.w @ x[0], w=(4,)), ROW),
    "stack": (raw(lambda m, x: x.unsqueeze(1) @ m.w, w=(2, 4, 3)), SEQUENCE),
    "stack, left": (raw(lambda m, x: m.w @ x.unsqueeze(1), w=(2, 3, 5)), SEQUENCE),
    "stack of one": (raw(lambda m, x: stacked(x).unsqueeze(1) @ m.w, w=(2, 1, 4, 3)), SEQUENCE),
    "column": (raw(lambda m, x: x.unsqueeze(-1) @ m.w, w=(1, 3)), ROW),
    "bmm": (raw(lambda m, x: torch.bmm(x.mT, m.w), w=(1, 5, 3)), SEQUENCE),
    "baddbmm": (
        raw(lambda m, x: torch.baddbmm(m.b, x, m.w, beta=2, alpha=0.5), w=(1, 4, 3), b=(1, 5, 1)),
        SEQUENCE,
    ),
    "mm": (raw(lambda m, x: x.mm(m.w), w=(4, 3)), ROW),
    "mv": (raw(lambda m, x: torch.mv(m.w, x[0]).unsqueeze(0), w=(3, 4)), ROW),
    "mv, right": (raw(lambda m, x: x[0].mv(m.w).unsqueeze(0), w=(4,)), SEQUENCE),
    "addmm": (
        raw(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), w=(4, 3), b=(3,)),
        ROW,
    ),
    "addmm of a method": (raw(lambda m, x: m.b.addmm(x, m.w), w=(4, 3), b=(1, 1)), ROW),
    "bilinear": (raw(lambda m, x: F.bilinear(x, x.sin(), m.w, m.b), w=(3, 4, 4), b=(3,)), SEQUENCE),
    "linear of a vector": (raw(lambda m, x: F.linear(x, m.w), w=(4,)), SEQUENCE),
    "two": (raw(lambda m, x: x @ (m.u @ m.v), u=(4, 2), v=(2, 3)), ROW),
    "square": (raw(lambda m, x: x @ m.w @ m.w, w=(4, 4)), ROW),
    "of itself": (raw(lambda m, x: x @ (m.w @ m.w), w=(4, 4)), ROW),
    "tensordot": (raw(lambda m, x: torch.tensordot(x, m.w, 2), w=(5, 4, 3)), SEQUENCE),
    "tensordot, named": (
        raw(lambda m, x: torch.tensordot(m.w, x, ([0, -1], [2, 1])).mT, w=(4, 3, 5)),
        SEQUENCE,
    ),
}
EQUATIONS = {
    "bti,io->bto": (4, 3),
    "bti,oi->bto": (3, 4),
    "bti,tio->bto": (5, 4, 3),
    "bti,oti->bo": (3, 5, 4),
    "bti,iot->bo": (4, 3, 5),
    "bti,ito->bto": (4, 5, 3),
    "bti,iot->bot": (4, 3, 5),
    "bti,i->bti": (4,),
    "bti,i->bt": (4,),
    "bti,o->bo": (3,),
    "bti,ti->b": (5, 4),
    "bti, i o": (4, 3),
    "...i,io->...o": (4, 3),
    "...i,oi": (3, 4),
    "b...,o...->bo": (3, 1, 4),
    "bti,jo->bto": (2, 3),
    "bti,iio->bto": (4, 4, 3),
}
for equation, shape in EQUATIONS.items():
    PRODUCTS[equation] = (
        raw(lambda m, x, equation=equation: torch.einsum(equation, x, m.w), w=shape),
        SEQUENCE,
    )
PRODUCTS["three"] = (
    raw(lambda m, x: torch.einsum("bti,oij,btj->bto", x, m.w, x.sin()), w=(3, 4, 4)),
    SEQUENCE,
)
PRODUCTS["three, two of them parameters"] = (
    raw(lambda m, x: torch.einsum("bti,ir,ro->bto", x, m.u, m.v), u=(4, 2), v=(2, 3)),
    SEQUENCE,
)
VIEWS = {
    "t": ((4, 3), lambda m, x: x @ m.w.t().t()),
    "T": ((3, 4), lambda m, x: x @ m.w.T),
    "mT": ((3, 4), lambda m, x: x @ m.w.mT),
    "transpose": ((3, 4), lambda m, x: F.linear(x, m.w.transpose(-1, -2).transpose(1, 0))),
    "chunk": ((9, 4), lambda m, x: sum(F.linear(x, w) * n for n, w in enumerate(m.w.chunk(3), 2))),
    "some chunks": ((9, 4), lambda m, x: F.linear(x, m.w.chunk(3)[1])),
    "chunk, last": ((4, 6), lambda m, x: x @ m.w.chunk(2, dim=-1)[0] * (x @ m.w.chunk(2, -1)[1])),
    "split": ((4, 6), lambda m, x: x[..., :1] @ m.w.split([1, 3], dim=0)[0]),
    "torch.split": ((4, 6), lambda m, x: sum(x @ w for w in torch.split(m.w, 2, dim=-1))),
    "unbind": ((4, 3, 2), lambda m, x: x @ m.w.unbind(-1)[0] + (x @ m.w.unbind(-1)[1]).sin()),
    "unpacked": ((2, 3, 4), lambda m, x: F.linear(x, [*m.w][1]).tanh()),
    "first": ((2, 4, 3), lambda m, x: x @ m.w[0]),
    "columns": ((4, 4), lambda m, x: x @ m.w[:, 1:]),
    "every other": ((4, 6), lambda m, x: x @ m.w[:, ::2] + x @ m.w[..., 1::2]),
    "overlapping": ((4, 6), lambda m, x: x @ m.w[:, :4] + (x @ m.w[:, 2:]).sin()),
    "all and a part": ((4, 6), lambda m, x: x @ m.w + (x[..., :2] @ m.w[1:3]).sin()),
    "more dimensions": ((4, 3), lambda m, x: x @ m.w[None]),
    "ellipsis": ((4, 3, 2), lambda m, x: x @ m.w[..., 1]),
    "element": ((4, 3), lambda m, x: x @ m.w[:, 1:2] * m.w[0, 0]),
    "view": ((12,), lambda m, x: x @ m.w.view(4, -1)),
    "reshape": ((2, 6), lambda m, x: x @ m.w.reshape(-1)[:4]),
    "unflatten": ((12,), lambda m, x: x @ m.w.unflatten(0, (4, 3))),
    "flatten": ((4, 3, 2), lambda m, x: x @ m.w.flatten(1)),
    "permute": ((2, 3, 4), lambda m, x: torch.einsum("bti,ioh->btho", x, m.w.permute(2, 1, 0))),
    "movedim": ((3, 2, 4), lambda m, x: x @ m.w.movedim(-1, 0).flatten(1)),
    "narrow": ((6, 3), lambda m, x: x @ m.w.narrow(0, 1, 4)),
    "select": ((4, 2, 3), lambda m, x: x @ m.w.select(1, -1)),
    "squeeze": ((1, 4, 1, 3), lambda m, x: x @ m.w.squeeze()),
    "squeeze, named": ((1, 4, 3), lambda m, x: x @ torch.squeeze(m.w, dim=0)),
    "copy": ((3, 4), lambda m, x: x @ m.w.t().reshape(-1)[:4] + x @ m.w.t().ravel()[4:8]),
    "contiguous": ((4, 3), lambda m, x: x @ m.w.contiguous().float().to(x.dtype)),
    "bits": ((4, 3), lambda m, x: x @ m.w * m.w.view(torch.uint8).sum().sign()),
    "chosen": ((4, 3), lambda m, x: x @ m.w[torch.tensor([1, 0, 3, 3])]),
    "chosen by a list": ((4,), lambda m, x: x[..., :2] @ m.w[[0, 2]]),
    "chosen to a number": ((6, 3), lambda m, x: x @ m.w[torch.tensor(1) : torch.tensor(5)]),
    "chosen by a number": ((2, 4, 3), lambda m, x: x @ m.w[torch.tensor(1)]),
    "by name": ((3, 4), lambda m, x: x @ torch.transpose(input=m.w, dim0=0, dim1=1)),
    "used elsewhere": ((3, 4), lambda m, x: x @ m.w.t() * m.w.exp().sum() + x @ m.w[:1].t()),
    "as another": ((12,), lambda m, x: x @ m.w.view_as(torch.empty(4, 3, dtype=x.dtype))),
    "copied": ((4, 3), lambda m, x: x @ m.w.clone()),
    "many": ((40, 4), lambda m, x: torch.stack([x @ row for row in m.w], -1)),
}
PARTS = {name: (raw(func, w=shape), SEQUENCE) for name, (shape, func) in VIEWS.items()}

ATTENTION = {
    "self": (attention(lambda a, x: a(x, x, x, need_weights=False)[0]), SEQUENCE),
    "weights": (attention(lambda a, x: a(x, x, x)[1], bias=False), SEQUENCE),
    "cross": (attention(lambda a, x: a(x, x.sin(), x.cos())[0]), SEQUENCE),
    "encoder-decoder": (
        attention(lambda a, x: (lambda y: a(x, y, y, need_weights=False)[0])(x.sin())),
        SEQUENCE,
    ),
    "sizes": (attention(lambda a, x: a(x, x[..., :3], x[..., 1:3])[0], kdim=3, vdim=2), SEQUENCE),
    "extra": (
        attention(lambda a, x: a(x, x, x)[0], add_bias_kv=True, add_zero_attn=True),
        SEQUENCE,
    ),
    "masked": (attention(lambda a, x: a(x, x, x, attn_mask=MASK, is_causal=True)[0]), SEQUENCE),
    "padded": (
        attention(lambda a, x: a(x, x, x, key_padding_mask=MASK[:1] & (x[..., 0] < 99))[0]),
        SEQUENCE,
    ),
    "by einsum": (lambda: Encoder(True), SEQUENCE),
    "by matmul": (lambda: Encoder(False), SEQUENCE),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        SEQUENCE,
    ),
    "encoder layer, eval": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True).eval(),
        SEQUENCE,
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2, enable_nested_tensor=False
        ).eval(),
        SEQUENCE,
    ),
    "decoder layer": (
        lambda: Around(
            nn.TransformerDecoderLayer(4, 2, 6, batch_first=True).eval(),
            lambda layer, x: layer(x, x[:, 1:].sin()),
        ),
        SEQUENCE,
    ),
    "transformer": (
        lambda: Around(
            nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True),
            lambda layer, x: layer(x, x[:, :2].sin()),
        ),
        SEQUENCE,
    ),
}

RECURRENT = {
    f"{kind} {' '.join(f'{k}={v}' for k, v in options.items())}": (
        recurrent(kind, **options),
        SEQUENCE,
    )
    for kind in ("LSTM", "GRU", "RNN")
    for options in ({}, {"bidirectional": True, "num_layers": 2}, {"bias": False})
} | {
    "RNN relu": (recurrent("RNN", nonlinearity="relu"), SEQUENCE),
    "LSTM proj": (recurrent("LSTM", proj_size=2, num_layers=2, bidirectional=True), SEQUENCE),
    "LSTM proj without bias": (recurrent("LSTM", proj_size=2, bias=False), SEQUENCE),
    "last states": (
        lambda: Around(
            nn.LSTM(4, 3, 2, bidirectional=True),
            lambda layer, x: torch.cat(layer(x.transpose(0, 1))[1], -1).transpose(0, 1),
        ),
        SEQUENCE,
    ),
    "first states": (
        lambda: Around(
            nn.GRU(4, 3, batch_first=True),
            lambda layer, x: layer(x, x[:, :1, :3].transpose(0, 1).contiguous())[0],
        ),
        SEQUENCE,
    ),
    "learned first states": (Learned, SEQUENCE),
    "unbatched": (
        lambda: Around(nn.GRU(4, 3), lambda layer, x: layer(x.squeeze(0))[0].unsqueeze(0)),
        SEQUENCE,
    ),
    "LSTM cell": (lambda: Cells(nn.LSTMCell(4, 3)), SEQUENCE),
    "GRU cell": (lambda: Cells(nn.GRUCell(4, 3, bias=False)), SEQUENCE),
    "RNN cell": (lambda: Cells(nn.RNNCell(4, 3)), SEQUENCE),
    "RNN cell, relu": (lambda: Cells(nn.RNNCell(4, 3, nonlinearity="relu")), SEQUENCE),
}

MIXED = {
    "tied": (Tied, TOKENS),
    "twice": (Twice, ROW),
    "mix": (Mix, SEQUENCE),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), ROW),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), ROW),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 3)), ROW),
    "normed recurrent": (
        lambda: Around(
            parametrizations.weight_norm(nn.LSTM(4, 3, batch_first=True), "weight_hh_l0"),
            lambda layer, x: layer(x)[0],
        ),
        SEQUENCE,
    ),
}
MODELS = {
    f"{family}: {name}": case
    for family, cases in (
        ("product", PRODUCTS),
        ("view", PARTS),
        ("attention", ATTENTION),
        ("recurrent", RECURRENT),
        ("mixed", MIXED),
    )
    for name, case in cases.items()
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
UNSEEN = (
    "copy",
    "contiguous",
    "chosen",
    "chosen by a number",
    "chosen by a list",
    "chosen to a number",
    "by name",
    "as another",
    "copied",
    "many",
)
UNCOVERED = {
    **{f"view: {view}": {"w"} for view in (*UNSEEN, "used elsewhere")},
    **{f"product: {equation}": {"w"} for equation in ("bti,jo->bto", "bti,iio->bto")},
    "attention: extra": {"layer.bias_k", "layer.bias_v"},
    "recurrent: learned first states": {"first"},
    "mixed: mix": {"raw"},
    "mixed: weight norm": {f"parametrizations.weight.original{n}" for n in range(2)},
    "mixed: orthogonal": {"parametrizations.weight.original"},
    "mixed: normed recurrent": {
        f"layer.parametrizations.weight_hh_l0.original{n}" for n in range(2)
    },
}
"""What flows through the ordinary engine, at least in part."""

OF_ONE = {"product: W @ x", "product: bmm", "product: baddbmm"}
"""What takes batches of one alone."""

PRECISIONS = {torch.float64: 1e-10, torch.float32: 1e-5}


def case(name, dtype):
    """The same numbers in every precision."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    x = torch.randint(7, (3, 5)) if shape is TOKENS else torch.randn(shape).to(dtype)
    return make().to(dtype), x


@cache
def one_by_one(name):
    """``[B, *out, *param]`` by one backward pass a row, without vmap; in float64."""
    model, inputs = case(name, torch.float64)
    params = dict(model.named_parameters())
    samples = []
    for x in inputs:
        out = model(x.unsqueeze(0)).squeeze(0)
        rows = [
            torch.autograd.grad(e, params.values(), retain_graph=True, materialize_grads=True)
            for e in out.reshape(-1)
        ]
        samples.append(
            [torch.stack(r).view(*out.shape, *r[0].shape) for r in zip(*rows, strict=True)]
        )
    return dict(zip(params, map(torch.stack, zip(*samples, strict=True)), strict=True))


def assert_near(found, expected, tolerance):
    error = (found.double() - expected).abs().max()
    assert error <= tolerance * max(1.0, float(expected.abs().max())), float(error)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["tree", "flat"])
@EVERY_MODEL
def test_every_sample(name, flat, dtype):
    model, x = case(name, dtype)
    expected = one_by_one(name)
    jacobian = jacfunc.module_jacobian(model, per_sample=True, flat=flat, strategy="structured")
    jacobian(x)
    found = jacobian(x)  # without copies of parameters
    if flat:
        lead = next(iter(expected.values())).dim() - next(model.parameters()).dim()
        together = torch.cat([block.flatten(lead) for block in expected.values()], -1)
        assert_near(found.reshape(together.shape), together, PRECISIONS[dtype])
        return
    assert found.keys() == expected.keys()
    for key, block in expected.items():
        assert found[key].shape == block.shape
        assert_near(found[key], block, PRECISIONS[dtype])


@EVERY_MODEL
def test_rules_see_every_use(name):
    model, x = case(name, torch.float64)
    names = [key for key, _ in model.named_parameters()]
    jacobian = jacfunc.module_jacobian(model, per_sample=True, strategy=Structured())
    with learning() as learned:
        jacobian(x)
    others = [{names[number] for number in uses.others} for uses in learned]
    if len(others) == 1:  # as a whole: what parameters alone make is covered, too
        assert others == [set()]
    else:
        assert others[1] == UNCOVERED.get(name, set())


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("view")])
def test_views_of_few_rows_and_samples(name, size, chunk):
    model, x = case(name, torch.float64)
    strategy = Structured(chunk_size=chunk)
    found = jacfunc.module_jacobian(model, per_sample=True, strategy=strategy)(x[:size])
    assert_near(found["w"], one_by_one(name)["w"][:size], 1e-10)


def whole(model, *args):
    """``(found, expected)`` of the whole call by a structured sweep, and row by row by autograd."""
    params = dict(model.named_parameters())

    def of_params(params):
        torch.manual_seed(1)
        return functional_call(model, params, args)

    found = jacfunc.jacobian(of_params, strategy="structured")(
        {key: param.detach() for key, param in params.items()}
    )
    out = of_params(params)
    rows = [
        torch.autograd.grad(e, params.values(), retain_graph=True, materialize_grads=True)
        for e in out.reshape(-1)
    ]
    expected = [torch.stack(r).view(*out.shape, *r[0].shape) for r in zip(*rows, strict=True)]
    return found, dict(zip(params, expected, strict=True))


@EVERY_MODEL
def test_the_whole_call(name):
    model, x = case(name, torch.float64)
    found, expected = whole(model, x[:1] if name in OF_ONE else x)
    for key, block in expected.items():
        assert_near(found[key], block, 1e-10)


class Packed(nn.Module):
    """All that comes out of sequences of different lengths."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        packed, last = self.layer(pack_padded_sequence(x, torch.tensor([5, 3, 3, 1])))
        last = last if isinstance(last, tuple) else (last,)
        return torch.cat([y.flatten() for y in (packed.data, *last)])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_packed_sequences(kind, options):
    torch.manual_seed(0)
    model = Packed(getattr(nn, kind)(4, 3, **options)).double()
    found, expected = whole(model, torch.randn(5, 4, 4, dtype=torch.float64))
    for key, block in expected.items():
        assert_near(found[key], block, 1e-10)


def test_batch_in_the_second_dimension():
    model, x = case("recurrent: GRU ", torch.float64)
    turned = Around(nn.GRU(4, 3).double(), lambda layer, x: layer(x)[0].transpose(0, 1))
    turned.load_state_dict(model.state_dict())
    jac = jacfunc.module_jacobian(turned, per_sample=True, strategy="structured", in_dims=1)
    for key, block in jac(x.transpose(0, 1)).items():
        assert_near(block, one_by_one("recurrent: GRU ")[key], 1e-10)


@pytest.mark.parametrize("grad", [True, False])
def test_frozen_layers_run_under_vmap(grad):
    torch.manual_seed(0)
    frozen = nn.LSTM(4, 3, batch_first=True).double().requires_grad_(False)

    def forward(layer, x):
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            x = frozen(x)[0]
        return layer(x).mean(1)

    model, x = Around(nn.Linear(3, 2).double(), forward), torch.randn(3, 5, 4).double()
    jac = jacfunc.module_jacobian(model, per_sample=True, strategy="structured")
    for block, sample in zip(jac(x)["layer.weight"], frozen(x)[0].mean(1), strict=True):
        assert_near(block, torch.einsum("op,i->opi", torch.eye(2).double(), sample), 1e-10)


def test_inputs_that_are_written_into_later_are_refused():
    def forward(model, x):
        x = x.clone()
        y = F.linear(x, model.w)
        return y * x.mul_(2).sum(1, keepdim=True)

    model = Model(forward, w=(2, 4))
    jac = jacfunc.module_jacobian(model, per_sample=True, strategy="structured")
    with pytest.raises(NotImplementedError, match="went into a layer was written into after it"):
        jac(torch.ones(3, 4))


DROPOUT = {
    "LSTM": lambda: Around(
        nn.LSTM(4, 3, 3, dropout=0.5, batch_first=True, bidirectional=True),
        lambda layer, x: layer(x)[0],
    ),
    "GRU": lambda: Around(nn.GRU(4, 3, 2, dropout=0.5), lambda layer, x: layer(x)[0]),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, batch_first=True),
    "attention": lambda: Around(
        nn.MultiheadAttention(4, 2, dropout=0.5), lambda layer, x: layer(x, x, x)[0]
    ),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_draws_what_torch_does(name):
    torch.manual_seed(0)
    model = DROPOUT[name]().double()
    found, expected = whole(model, torch.randn(3, 5, 4, dtype=torch.float64))
    for key, block in expected.items():
        assert_near(found[key], block, 1e-10)


@pytest.mark.parametrize("name", ["LSTM", "encoder"])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_samples_draw_for_themselves(name, randomness):
    torch.manual_seed(0)
    model = DROPOUT[name]().double()
    jac = jacfunc.module_jacobian(
        model, per_sample=True, strategy="structured", randomness=randomness
    )
    x = torch.randn(1, 5, 4, dtype=torch.float64).expand(3, 5, 4)
    first, second, third = next(iter(jac(x).values()))
    assert torch.allclose(first, second) == (randomness == "same")
    assert torch.allclose(second, third) == (randomness == "same")


@pytest.mark.parametrize(
    "name",
    [
        "view: overlapping",
        "view: chunk, last",
        "attention: cross",
        "recurrent: GRU ",
        "mixed: twice",
    ],
)
def test_differentiable(name):
    model, x = case(name, torch.float64)
    params = {key: param.detach().requires_grad_() for key, param in model.named_parameters()}

    def of_params(params):
        return functional_call(model, params, (x,))

    def norm(strategy):
        blocks = jacfunc.jacobian(of_params, strategy=strategy)(params)
        total = sum(block.pow(2).sum() for block in blocks.values())
        return torch.autograd.grad(total, params.values(), materialize_grads=True)

    for found, expected in zip(norm("structured"), norm("looped"), strict=True):
        assert_near(found, expected, 1e-10)


ROWS = View(Tensor.__getitem__, (slice(0, 2),), {})
LATER = View(Tensor.__getitem__, (slice(1, 4),), {})
LAST = View(Tensor.__getitem__, (slice(2, 4),), {})
TURNED = View(Tensor.t, (), {})
PATHS = {
    "none": [],
    "all": [()],
    "turned": [(TURNED,)],
    "disjoint": [(ROWS,), (LAST,)],
    "some": [(ROWS,), (ROWS,)],
    "turned and as it is": [(TURNED,), (), (LAST, TURNED)],
    "overlapping": [(ROWS,), (LATER,)],
    "overlapping, larger last": [(ROWS,), (LAST,), (LATER,), (ROWS, TURNED)],
}


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
def test_parts_leave_nothing_of_what_was_there(paths):
    torch.manual_seed(0)
    expected, parts = torch.zeros(2, 3, 4, 5), []
    for path in paths:
        # entry by entry: the view of numbered entries says where each goes
        number = torch.arange(20).view(4, 5)
        for view in path:
            number = view(number)
        part = Part(path, Rows(torch.randn(3, 2, *number.shape)))
        for k, b, n in itertools.product(range(3), range(2), range(number.numel())):
            place = expected[b, k].view(-1)
            place[number.flatten()[n]] += part.form.products[k, b].flatten()[n]
        parts.append(part)
    block = torch.full((2, 3, 40), torch.nan)[..., 10:30].unflatten(-1, (4, 5))
    write(parts, block)
    assert torch.allclose(block, expected)
    assert torch.allclose(rows(parts, lambda: torch.zeros(2, 3, 4, 5)), expected)


def test_complex_data():
    torch.manual_seed(0)
    data, w = torch.randn(3, 4, dtype=torch.complex128), torch.randn(4, 2, dtype=torch.float64)

    def func(w):
        return torch.einsum("bi,io->bo", data, w.to(data.dtype)).abs()

    found, expected = (jacfunc.jacobian(func, strategy=s)(w) for s in ("structured", "looped"))
    assert_near(found, expected, 1e-10)


def of_weights(weight, bias, x):
    return F.linear(x, weight, bias).tanh()


@pytest.mark.parametrize("dims", [(0, None, None), (0, 0, None), (None, None, 0), (0, 0, 0)])
def test_inside_vmap(dims):
    sizes = [(3, 5), (3,), (5,)]
    args = [
        torch.randn(4, *s, dtype=torch.float64) if d == 0 else torch.randn(s, dtype=torch.float64)
        for s, d in zip(sizes, dims, strict=True)
    ]
    jac = jacfunc.jacobian(of_weights, argnums=(0, 1), strategy="structured")
    found = torch.vmap(jac, in_dims=dims)(*args)
    for number in range(4):
        one = [a[number] if d == 0 else a for a, d in zip(args, dims, strict=True)]
        slope = torch.diag_embed(1 - of_weights(*one).square())
        expected = (slope.unsqueeze(-1) * one[2], slope)
        for mine, other in zip(found, expected, strict=True):
            assert_near(mine[number], other, 1e-12)


@pytest.mark.parametrize("name", [f"product: {n}" for n in ("x @ W of sequences", "two", "square")])
def test_samples_inside_vmap(name):
    """Batches of batches."""
    model, x = case(name, torch.float64)
    jac = jacfunc.module_jacobian(model, per_sample=True, strategy="structured")
    found = torch.vmap(jac)(torch.stack([x, x.flip(0)]))
    for key, block in one_by_one(name).items():
        assert_near(found[key], torch.stack([block, block.flip(0)]), 1e-10)


def test_inside_a_derivative():
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    x = torch.randn(5).double()

    def squared(weight):
        block = jacfunc.jacobian(of_weights, strategy="structured")(weight, bias, x)
        return block.square().sum()

    def by_formula(weight):
        return ((1 - of_weights(weight, bias, x).square()) ** 2).sum() * x.square().sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_formula(leaf), leaf)
    assert_near(torch.func.grad(squared)(weight), expected, 1e-10)
    tangent = torch.randn_like(weight)
    _, product = torch.func.jvp(squared, (weight,), (tangent,))
    assert_near(product, (expected * tangent).sum(), 1e-10)
