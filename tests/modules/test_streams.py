"""Jacobians block by block: against a loop over outputs, and in little memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import jacfunc
from jacfunc._memory.counting import PeakBytes
from tests.modules.test_modules import MODULES, NO_VMAP, case, per_sample_reference, reference

NAMES = sorted(MODULES)
# under vmap a checkpoint would run again with the tensors of a vmap that is over
VMAPPED = [name for name in NAMES if name not in NO_VMAP | {"checkpoint"}]
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
@pytest.mark.parametrize("name", VMAPPED)
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
    with pytest.raises(NotImplementedError, match="a graph that is kept, got a call inside"):
        torch.vmap(lambda x: next(jacfunc.stream_jacobian(module)(x))[1])(torch.randn(2, 3))
