"""Jacobians block by block: against a loop over outputs, and in little memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import jacfunc
from jacfunc._memory.counting import PeakBytes
from tests.modules.test_modules import MODULES, case, per_sample_reference, reference

NAMES = sorted(MODULES)
CHUNKS = (None, 1, 2)


def joined(blocks, dim):
    """Rows or samples by name, one after the other."""
    blocks = list(blocks)
    stops = [part.stop for part, _ in blocks]
    assert [part.start for part, _ in blocks] == [0, *stops[:-1]]
    return {name: torch.cat([block[name] for _, block in blocks], dim) for name in blocks[0][1]}


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", NAMES)
def test_whole_batch(name, chunk_size):
    module, x = case(name)
    want, _ = reference(module, x)
    result = jacfunc.stream_jacobian(module, "params", chunk_size=chunk_size)(x)
    torch.testing.assert_close(dict(result), want)
    rows = joined(jacfunc.stream_jacobian(module, "rows", chunk_size=chunk_size)(x), 0)
    torch.testing.assert_close(rows, {name: block.flatten(0, 1) for name, block in want.items()})


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", NAMES)
def test_per_sample(name, chunk_size):
    module, x = case(name)
    want, _ = per_sample_reference(module, x)
    ways = {"per_sample": True, "chunk_size": chunk_size}
    result = jacfunc.stream_jacobian(module, "params", **ways)(x)
    torch.testing.assert_close(dict(result), want)
    torch.testing.assert_close(joined(jacfunc.stream_jacobian(module, "rows", **ways)(x), 1), want)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", NAMES)
def test_by_samples(name, chunk_size):
    module, x = case(name)
    want, _ = per_sample_reference(module, x)
    ways = {"per_sample": True, "chunk_size": chunk_size}
    result = jacfunc.stream_jacobian(module, "samples", **ways)(x)
    torch.testing.assert_close(joined(result, 0), want)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return {"hidden": hidden, "score": self.head(hidden)}


@pytest.mark.parametrize("per_sample", [False, True])
def test_several_outputs_and_a_selection(per_sample):
    torch.manual_seed(0)
    module, x = TwoHeads().double(), torch.randn(3, 3).double()
    ways = {"per_sample": per_sample, "select": "body.*"}
    want = jacfunc.module_jacobian(module, strategy="looped", **ways)(x)
    for name, block in jacfunc.stream_jacobian(module, **ways)(x):
        torch.testing.assert_close(block, {out: want[out][name] for out in want})
    rows = joined(jacfunc.stream_jacobian(module, "rows", chunk_size=4, **ways)(x), per_sample * 1)
    flat = jacfunc.module_jacobian(module, flat=True, **ways)(x)
    torch.testing.assert_close(
        torch.cat([b.flatten(1 + per_sample) for b in rows.values()], -1), flat
    )


calls: list[int] = []


class Counted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        calls.append(1)
        return self.inner(x)


@pytest.mark.parametrize("by", ["params", "rows"])
def test_one_evaluation_and_a_module_at_rest_between_blocks(by):
    inner, x = case("batch norm")
    module = Counted(inner)
    before, inside = copy.deepcopy(module.state_dict()), [dict(vars(m)) for m in module.modules()]
    calls.clear()
    for _ in jacfunc.stream_jacobian(module, by, chunk_size=1)(x):
        assert [dict(vars(m)) for m in module.modules()] == inside
        module.zero_grad()
    assert len(calls) == 1
    torch.testing.assert_close(dict(module.state_dict()), dict(before))


def test_dropout_has_one_mask_for_all_blocks():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 2)).double()
    x = torch.randn(4, 3).double()
    for randomness in ("same", "different"):
        ways = {"per_sample": True, "randomness": randomness}
        torch.manual_seed(1)
        blocks = dict(jacfunc.stream_jacobian(module, **ways)(x))
        torch.manual_seed(1)
        rows = joined(jacfunc.stream_jacobian(module, "rows", chunk_size=1, **ways)(x), 1)
        torch.testing.assert_close(blocks, rows)
        is_kept = blocks["2.weight"][:, 0, 0] != 0
        assert (is_kept == is_kept[0]).all() == (randomness == "same")


def squared_norm(block):
    parts = block.values() if isinstance(block, dict) else [block]
    return sum(part.square().sum() for part in parts)


def test_less_memory_than_the_jacobian():
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh())]
    module, x = nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(16, 64)
    total = 16 * 10 * 4 * sum(param.numel() for param in module.parameters())
    largest = 16 * 10 * 4 * 64 * 64
    for by, bound in (("params", 3 * largest), ("rows", total / 2), ("samples", total / 5)):
        chunk_size = 10 if by == "params" else 1
        stream = jacfunc.stream_jacobian(module, by, per_sample=True, chunk_size=chunk_size)
        with PeakBytes() as counter:
            norms = [squared_norm(block) for _, block in stream(x)]
        want = jacfunc.module_jacobian(module, per_sample=True, flat=True)(x).square().sum()
        torch.testing.assert_close(torch.stack(norms).sum(), want)
        assert counter.peak < bound, by


class CountedPullback(torch.autograd.Function):
    """The identity, which counts its pullbacks: one for each sweep, however many rows it has."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        sweeps.append(1)
        return grad


sweeps: list[int] = []


class Unruled(nn.Module):
    """Uses some parameters where no rule sees it, between layers that have rules."""

    def __init__(self, width=8, rows=12, counted=False):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, rows)
        self.inner = nn.Parameter(torch.randn(width, width))
        self.shift = nn.Parameter(torch.randn(width))
        self.counted = counted

    def forward(self, x):
        calls.append(len(x))
        h = torch.tanh(self.first(x))
        h = torch.tanh(h @ torch.linalg.matrix_exp(0.1 * self.inner) + self.shift.sin())
        return self.last(CountedPullback.apply(h) if self.counted else h)


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 12)])

    def forward(self, x):
        calls.append(len(x))
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](CountedPullback.apply(x))


SWEEPS = [
    ("params", True, None, 1, 1),
    ("params", True, 3, 4, 1),
    ("params", False, None, 1, 1),
    ("params", False, 12, 4, 1),
    ("rows", True, None, 1, 1),
    ("rows", True, 3, 4, 1),
    ("rows", False, None, 1, 1),
    ("rows", False, 12, 4, 1),
    ("samples", True, None, 1, 1),
    ("samples", True, 2, 2, 2),
    ("samples", True, 4, 1, 1),
]


@pytest.mark.parametrize(("by", "per_sample", "chunk_size", "pulled", "evaluated"), SWEEPS)
def test_one_evaluation_and_one_pass_of_pullbacks(by, per_sample, chunk_size, pulled, evaluated):
    torch.manual_seed(0)
    module, x = Perceptron().double(), torch.randn(4, 4).double()
    stream = jacfunc.stream_jacobian(
        module, by, per_sample=per_sample, chunk_size=chunk_size, independent=True
    )
    for _ in range(2):  # a first call may evaluate more, to learn how parameters are used
        calls.clear()
        sweeps.clear()
        blocks = list(stream(x))
    assert (len(calls), len(sweeps)) == (evaluated, pulled)
    want = jacfunc.module_jacobian(module, per_sample=per_sample, strategy="looped")(x)
    if by == "params":
        torch.testing.assert_close(dict(blocks), want)
    else:
        rows = joined(blocks, int(by == "rows" and per_sample))
        flat = {n: block.flatten(int(per_sample), int(per_sample)) for n, block in rows.items()}
        if by == "rows" and not per_sample:
            want = {name: block.flatten(0, 1) for name, block in want.items()}
        torch.testing.assert_close(flat, want)


class Deep(nn.Module):
    """Layers with rules, and between them one without."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(8)])
        self.inner = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        for layer in self.layers[:4]:
            x = torch.tanh(layer(x))
        x = torch.tanh(x @ self.inner.sin())
        for layer in self.layers[4:]:
            x = torch.tanh(layer(x))
        return x[:, :16]


BUDGETS = [
    (by, per_sample, share)
    for by in ("params", "rows", "samples")
    for per_sample in (True, False)
    for share in (0.9, 0.5, 0.35)
    if per_sample or by != "samples"
]


@pytest.mark.parametrize(("by", "per_sample", "share"), BUDGETS)
def test_a_stream_keeps_to_its_budget(by, per_sample, share):
    """With the block that a loop still has from its last turn."""
    torch.manual_seed(0)
    module, x = Deep(), torch.randn(16, 32)
    want = jacfunc.module_jacobian(module, per_sample=per_sample)(x)
    memory = int(share * sum(block.nbytes for block in want.values()))
    ways = {"per_sample": per_sample, "memory": memory, "independent": True}
    stream = jacfunc.stream_jacobian(module, by, **ways)
    list(stream(x))
    with PeakBytes() as counter:
        norms = [squared_norm(block) for _, block in stream(x)]
    total = sum(block.square().sum() for block in want.values())
    torch.testing.assert_close(torch.stack(norms).sum(), total)
    assert memory / 8 < counter.peak <= memory


class Conv(nn.Module):
    """Its factors take far more memory than its Jacobian."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        images = x.view(-1, 1, 2, 2).repeat(1, 1, 8, 8)
        return self.last(torch.tanh(self.first(images))).mean((2, 3))


def test_what_has_no_room_is_pulled_back_again():
    torch.manual_seed(0)
    module, x = Unruled(32, counted=True).double(), torch.randn(4, 4).double()
    want = jacfunc.module_jacobian(module, per_sample=True, strategy="looped")(x)
    counts = []
    for memory in ("100 MiB", "1100 KiB"):
        stream = jacfunc.stream_jacobian(
            module, per_sample=True, memory=memory, chunk_size=12, independent=True
        )
        for _ in range(2):
            sweeps.clear()
            torch.testing.assert_close(dict(stream(x)), want)
        counts.append(len(sweeps))
    assert counts[0] == 2 < counts[1]  # a sweep of two rows tells how many fit


def test_rows_are_held_where_factors_take_more():
    torch.manual_seed(0)
    module, x = Conv(), torch.randn(8, 4)
    want = jacfunc.module_jacobian(module, per_sample=True)(x)
    stream = jacfunc.stream_jacobian(module, per_sample=True, chunk_size=1)
    list(stream(x))
    with PeakBytes() as counter:
        torch.testing.assert_close(dict(stream(x)), want)
    one_row = 8 * 4 * 16 * 16 * 4 * 2
    assert counter.peak < 2 * sum(block.nbytes for block in want.values()) + 20 * one_row


def test_few_samples_are_evaluated_at_once_where_their_factors_are_large():
    module, x = Heavy(), torch.randn(5, 1, 64, 64)
    stream = jacfunc.stream_jacobian(module, "samples", per_sample=True, independent=True)
    for first in (1, 0):  # at the first call all are evaluated, and are too many to hold
        calls.clear()
        blocks = joined(stream(x), 0)
        assert calls[-5:] == [1] * 5
        assert (5 in calls) == first
    torch.testing.assert_close(blocks, jacfunc.module_jacobian(module, per_sample=True)(x))


class Heavy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, padding=1)

    def forward(self, x):
        calls.append(len(x))
        return self.conv(x).tanh().mean((2, 3)).repeat(1, 2)


class Widened(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x).double(), self.layer(x).half()


@pytest.mark.parametrize("by", ["params", "rows", "samples"])
def test_blocks_have_the_dtype_of_the_jacobian(by):
    module, x = Widened(), torch.randn(3, 3)
    want = jacfunc.module_jacobian(module, per_sample=True)(x)
    blocks = list(jacfunc.stream_jacobian(module, by, per_sample=True, chunk_size=3)(x))
    if by == "rows":
        for (_, rows), leaf in zip(blocks, want, strict=True):
            assert {n: x.dtype for n, x in rows.items()} == {n: x.dtype for n, x in leaf.items()}
    elif by == "samples":
        torch.testing.assert_close(blocks[0][1], want)
    else:
        torch.testing.assert_close(
            dict(blocks), {n: tuple(leaf[n] for leaf in want) for n in want[0]}
        )


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_each_sample_draws_its_own_in_every_chunk(chunk_size):
    module, x = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5)), torch.ones(4, 3)
    torch.manual_seed(0)
    ways = {"per_sample": True, "randomness": "different", "chunk_size": chunk_size}
    blocks = joined(jacfunc.stream_jacobian(module, "samples", **ways)(x), 0)
    masks = blocks["0.bias"].diagonal(dim1=1, dim2=2) != 0
    assert len({tuple(mask.tolist()) for mask in masks}) == 4


class Hooked(nn.Module):
    """Sets a hook where it sees a graph, which must not be passed by."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * 0.5)
        return self.last(hidden)


class Slope(nn.Module):
    """Takes a derivative of parameters' functions itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            total = self.net(inner).sum()
            return torch.autograd.grad(total, inner, create_graph=True)[0]


@pytest.mark.parametrize("by", ["params", "rows", "samples"])
@pytest.mark.parametrize("make", [Hooked, Slope])
def test_what_has_no_factors_is_streamed_all_the_same(make, by):
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(3, 3).double()
    want, _ = per_sample_reference(module, x)
    blocks = jacfunc.stream_jacobian(module, by, per_sample=True, chunk_size=2)(x)
    found = dict(blocks) if by == "params" else joined(blocks, int(by == "rows"))
    torch.testing.assert_close(found, want)
    if by == "params":
        torch.testing.assert_close(
            dict(jacfunc.stream_jacobian(module)(x)), reference(module, x)[0]
        )


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        y = self.layer(x)
        return y - y.mean(0)


@pytest.mark.parametrize("by", ["params", "rows", "samples"])
def test_dependent_samples_are_refused(by):
    stream = jacfunc.stream_jacobian(Centered(), by, per_sample=True, chunk_size=1)
    with pytest.raises(ValueError, match="samples that do not depend on each other"):
        list(stream(torch.randn(4, 3)))


def test_arguments_that_do_not_fit():
    module = nn.Linear(3, 2)
    with pytest.raises(
        ValueError, match="by must be one of 'params', 'rows', 'samples', got 'row'"
    ):
        jacfunc.stream_jacobian(module, "row")
    with pytest.raises(ValueError, match="by='samples' needs per_sample=True, got False"):
        jacfunc.stream_jacobian(module, "samples")
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got function"):
        jacfunc.stream_jacobian(lambda x: x)
    with pytest.raises(ValueError, match="memory must be a positive number of bytes, got 'lots'"):
        jacfunc.stream_jacobian(module, memory="lots")
    for by in ("params", "rows"):
        with pytest.raises(ValueError, match=r"memory must hold what is kept .* got 64 B\. Give"):
            list(jacfunc.stream_jacobian(module, by, memory=64)(torch.randn(2, 3)))
    with pytest.raises(NotImplementedError, match="a graph that is kept, got a call inside"):
        torch.vmap(lambda x: next(jacfunc.stream_jacobian(module)(x))[1])(torch.randn(2, 3))


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_module_without_parameters_has_blocks_without_entries(per_sample):
    """They were an IndexError by rows and by samples."""

    def blocks(by):
        return list(jacfunc.stream_jacobian(nn.Tanh(), by, per_sample=per_sample)(torch.ones(3, 2)))

    assert blocks("params") == []
    assert blocks("rows") == [(slice(0, 2 if per_sample else 6), {})]
    if per_sample:
        assert blocks("samples") == [(slice(0, 3), {})]
